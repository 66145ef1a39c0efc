"""The pre-training documents: theirs is the train users' reading, and nothing of their labels."""

from collections import Counter

import pytest

from trsr_dist.base.corpus import Corpus, PromptDocument, document_text
from trsr_dist.base.pretrain import train_tokenizer
from trsr_dist.records import Candidate, Sample

ANSWERS = ("no", "yes")
NUM_USERS, NUM_DOCUMENTS = 20, 2000


class Texts:
    """Users with three items each; what their samples ask for is in no history."""

    def __len__(self) -> int:
        return NUM_USERS

    def sample(self, user: int) -> Sample:
        candidates = (Candidate("t", f"target {user}", 1), Candidate("n", f"negative {user}", 0))
        return Sample(f"u{user}", "Decide.", f"summary {user}", (f"item {user}/2",), candidates)

    def history(self, sample: Sample) -> list[str]:
        return [f"item {sample.user[1:]}/{i}" for i in range(3)]


def documents(prompt_share: float = 0.5, seed: int = 0) -> list[PromptDocument | str]:
    return list(Corpus(Texts(), prompt_share, seed).documents(0, NUM_DOCUMENTS))


def test_a_document_depends_on_its_number_and_the_seed_alone() -> None:
    corpus = Corpus(Texts(), 0.5, seed=0)
    assert [corpus.document(n) for n in (1999, 3)] == [documents()[n] for n in (1999, 3)]
    assert documents(seed=1) != documents()


def test_targets_and_negatives_of_the_samples_are_nowhere() -> None:
    for document in documents():
        text = document_text(document, ANSWERS)
        assert "item" in text
        assert "target" not in text and "negative" not in text


@pytest.mark.parametrize("prompt_share", [0.0, 0.3, 1.0])
def test_the_share_of_prompts_is_the_one_asked_for(prompt_share: float) -> None:
    share = sum(isinstance(document, PromptDocument) for document in documents(prompt_share)) / NUM_DOCUMENTS
    assert share == pytest.approx(prompt_share, abs=0.04)


def test_the_answer_has_nothing_to_do_with_the_candidate() -> None:
    """Yes is as likely for a candidate from the user's own history as for another one, and both are frequent."""
    count: Counter[tuple[bool, int]] = Counter()
    for document in documents(prompt_share=1.0):
        own = document.sample.candidates[0].text in Texts().history(document.sample)
        count[own, document.answer] += 1
    for own in (True, False):
        total = count[own, 0] + count[own, 1]
        assert total > 0.4 * NUM_DOCUMENTS
        assert count[own, 1] / total == pytest.approx(0.5, abs=0.06)


def test_a_topic_is_one_token_wherever_it_stands() -> None:
    texts = ["sports/tennis (4), food/baking", "category: sports; subcategory: tennis; title: A serve", "Answer: yes"]
    tokenizer = train_tokenizer(texts * 50, 600)
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[:2])
    for word in ("tennis", "sports"):
        (token,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert token in first and token in second
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("text", ["Plain words, 12 numbers.", "Zoë's  two  blanks\n- naïve — ok", "日本語 and 🙂"])
def test_every_text_comes_back(text: str) -> None:
    tokenizer = train_tokenizer(["some other words entirely"], 512)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
