"""Texts in scripts without blanks count as their twins in scripts with blanks do, wherever words are counted."""

import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import trsr_dist
from trsr_dist.evaluate.baselines import Bm25
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.records import Candidate, Item, Sample
from trsr_dist.shards.inspect.checks import NO_TEXT, TARGET_IN_SUMMARY, near_duplicates, sample_faults
from trsr_dist.summarize.extract import extract, informative_words, split_fields
from trsr_dist.summarize.quality import flags_of, is_echo, is_preamble, is_repetitive
from trsr_dist.summarize.worker import check_leaks
from trsr_dist.words import comparable, count_words, cut_words, has_text, search_terms, split_words

ENGLISH = {
    "green tea bags domestic": "緑茶のティーバッグ国産",
    "lightweight hiking tent set": "登山用の軽量テントセット",
    "electric drill replacement bits": "電動ドリルの交換ビット",
    "wooden puzzle toy for children": "子供用の木製パズル玩具",
    "silent mechanical keyboard": "静音メカニカルキーボード",
}
ADJECTIVES = {"new": "新しい", "blue": "青い", "small": "小さい", "popular": "人気の"}
TWINS = {
    "English": "green tea bags, hiking tent light, drill bits electric, puzzle toy wooden, silent keyboard mechanical",
    "Chinese": "绿茶 茶包 国产, 登山 帐篷 轻便, 电钻 钻头 替换, 拼图 玩具 木制, 静音 键盘 机械",
    "Thai": "ชาเขียว แบบถุง พื้นเมือง, เต็นท์ เดินป่า น้ำหนักเบา, สว่าน ไฟฟ้า อะไหล่, ตัวต่อ ของเล่น ไม้สัก, แป้นพิมพ์ เงียบ กลไก",
    "Korean": "녹차 티백 국산, 등산 텐트 경량, 전동 드릴 비트, 퍼즐 완구 목제, 무소음 키보드 기계식",
}
OWN = {
    "English": "abcdefghijkl",
    "Chinese": "甲乙丙丁戊己庚辛壬癸子丑",
    "Thai": "กขคงจฉชซญดตถ",
    "Korean": "가나다라마바사아자차카타",
}
"""One letter for each item of a topic."""
PARTICLES = ["을", "의", "과", "만", "은", "도"]
NUM_ITEMS = 60


def twins(language: str) -> list[str]:
    """A catalogue as of ``titles``: the words of topic i % 5 in any order among the item's own letter; Korean ones
    carry particles."""
    stream, topics, made = random.Random(0), TWINS[language].split(", "), []
    for i in range(NUM_ITEMS):
        words = [*topics[i % 5].split(), OWN[language][i // 5]]
        if language == "Korean":
            words = [word + stream.choice(PARTICLES) for word in words]
        made.append(("" if language in ("Chinese", "Thai") else " ").join(stream.sample(words, 4)))
    return made


def titles(is_japanese: bool) -> list[str]:
    """The same catalogue in either language; item i is of topic i % 5."""
    stream, topics = random.Random(0), list(ENGLISH)
    made = []
    for i in range(NUM_ITEMS):
        adjective, topic = stream.choice(list(ADJECTIVES)), topics[i % len(topics)]
        japanese = f"{ADJECTIVES[adjective]}{ENGLISH[topic]}{i}号"
        made.append(japanese if is_japanese else f"{adjective} {topic} number {i}")
    return made


def recall_at_3(texts: Sequence[str]) -> float:
    """Of BM25: a user keeps to one topic; of ten candidates the first is of that topic."""
    stream, rank, hits = random.Random(1), Bm25(texts), 0
    for user in range(100):
        mine = [i for i in range(NUM_ITEMS) if i % 5 == user % 5]
        *history, target = stream.sample(mine, 6)
        others = stream.sample([i for i in range(NUM_ITEMS) if i % 5 != user % 5], 9)
        scores = rank(history, [target, *others])
        hits += int((scores > scores[0]).sum() + ((scores == scores[0]).sum() - 1) / 2 < 3)
    return hits / 100


def test_bm25_ranks_a_mixed_catalogue_by_what_its_texts_share() -> None:
    texts = ["绿茶茶包 Tea", "国产绿茶", "登山帐篷 Tent", "緑茶のティーバッグ", "军用帐篷"]
    scores = Bm25(texts)([0], [1, 2, 3, 4])
    assert (scores > 0).tolist() == [True, False, False, False], "simplified characters are others than Japanese ones"
    assert Bm25(texts)([2], [0, 1, 3, 4]).argmax() == 3


def summary_of(texts: Sequence[str], max_words: int = 30) -> str:
    return extract(SummaryPrompt("", (), tuple(f"title: {text}" for text in texts)), max_words)


def test_bm25_ranks_a_japanese_catalogue_as_its_english_twin() -> None:
    english, japanese = recall_at_3(titles(False)), recall_at_3(titles(True))
    assert english > 0.95
    assert japanese == pytest.approx(english, abs=0.02)


@pytest.mark.parametrize("language", list(TWINS))
def test_bm25_ranks_a_catalogue_in_any_script(language: str) -> None:
    assert recall_at_3(twins(language)) > 0.98, "Korean words as they stand give 0.95, Chinese and Thai ones 0"


def test_a_summary_lists_what_titles_have_in_common_not_the_titles() -> None:
    for is_japanese, common in ((True, ("緑茶", "国産", "ティーバッグ")), (False, ("green", "domestic", "bags"))):
        texts = titles(is_japanese)
        text = summary_of(texts[::5][:6])
        assert all(f"{word} (6)" in text for word in common)
        assert not any(title in text for title in texts)
        assert len(split_words(text)) <= 30
    assert len(split_words(summary_of(titles(True), 10))) <= 10


def test_words_of_a_summary_come_from_every_script() -> None:
    assert informative_words("绿茶茶包国产") == ["绿茶", "茶茶", "茶包", "包国", "国产"]
    assert informative_words("녹차 티백 a") == ["녹차", "티백"]
    assert informative_words("हिन्दी समाचार") == ["हिन्दी", "समाचार"]
    assert "ภาษา" in informative_words("ภาษาไทยภาษาไทย")
    assert split_fields("category: お茶・飲料; title: 新しい緑茶のティーバッグ国産0号")[0] == ["お茶・飲料"]


def test_repetition_echo_and_preamble_are_seen() -> None:
    natural = "青い登山用の軽量テントセットと電動ドリルの交換ビットを好み、最近は子供用の木製パズル玩具も見ている。"
    assert is_repetitive("緑茶が好きです。" * 10)
    assert is_repetitive("緑茶好き" * 12)
    assert not is_repetitive(natural)
    assert is_echo(f"はい、{natural[3:30]}です", natural)
    assert not is_echo("利用者は紅茶を好む", natural)
    assert is_preamble("要約です")
    assert not is_preamble(natural)


def test_near_duplicates_are_found_as_in_english() -> None:
    long = "".join(titles(True)[:3])
    assert near_duplicates({"a": long}, {"b": long.replace("国", "外")}) == {"a": "b"}
    assert near_duplicates({"a": titles(True)[0]}, {"b": titles(True)[1]}) == {}


def test_a_target_in_the_summary_is_seen() -> None:
    target = titles(True)[0]
    sample = Sample("u", "", f"最近は{target}を見た", (), (Candidate("a", target, 1), Candidate("b", "他の品物", 0)))
    assert TARGET_IN_SUMMARY in set(sample_faults(sample))


def test_texts_of_symbols_alone_are_used_as_they_are() -> None:
    prompt = SummaryPrompt("", (), ("?", "!!!", "★★★"))
    text = extract(prompt, 20)
    assert text
    assert flags_of(text, prompt, False, False) == ()
    assert flags_of("...", SummaryPrompt("", (), ("a tea",)), False, False) == ("empty",)
    assert flags_of("\u200b", prompt, False, False) == ("empty",)
    assert comparable("?") != comparable("!!!")


def test_zero_width_characters_are_no_text() -> None:
    assert not has_text("\u200b \ufeff\u2060\x00")
    assert has_text("★")
    sample = Sample("u", "", "", (), (Candidate("a", "tea", 1), Candidate("b", "\u200b", 0)))
    assert NO_TEXT in set(sample_faults(sample))
    assert split_words("\u200b a \u200b") == ["a"]
    assert (count_words("\u200b"), cut_words("\u200ba b", 1).strip("\u200b")) == (0, "a")
    assert search_terms("soft\u00adware a\u200bb") == ["software", "a", "b"]


def test_one_module_counts_words() -> None:
    counting = re.compile(r"len\([^()]*\.split\(\)\)|\\w\+\"\)")
    assert counting.search("n = len(text.split())") and counting.search(r're.compile(r"\w+")')
    for path in Path(trsr_dist.__file__).parent.rglob("*.py"):
        assert path.name == "words.py" or not counting.search(path.read_text()), path


def test_terms_are_words_and_n_grams_in_one_form() -> None:
    assert search_terms("Red FOX's 2nd") == ["red", "fox", "s", "2nd"]
    assert search_terms("緑茶Tea") == ["緑茶", "tea"]
    assert search_terms("ﾃｨｰﾊﾞｯｸﾞ ＡＢＣ") == search_terms("ティーバッグ abc")
    assert search_terms("绿茶") == ["绿茶"]
    assert search_terms("绿茶茶包 茶") == ["绿茶", "茶茶", "茶包", "茶"]
    assert search_terms("緑茶のティー") == ["緑茶", "茶の", "のテ", "ティ", "ィー"]
    assert search_terms("ภาษา ชา") == ["ภาษ", "าษา", "ชา"]
    assert search_terms("갤럭시S24를 샀다 차") == ["갤럭", "럭시", "s24", "를", "샀다", "차"]
    assert search_terms("日本ไทย한국tea") == ["日本", "ไทย", "한국", "tea"]
    assert search_terms("हिन्दी") == ["हिन्दी"], "a word is not cut at its vowel signs"


def test_items_that_differ_in_vowel_signs_alone_are_no_near_duplicates() -> None:
    # News and rice.
    pair = Item("a", "ข่าว"), Item("b", "ข้าว")
    assert check_leaks("u", pair[:1], pair[1:], False).near_duplicates == 0
