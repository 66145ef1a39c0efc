"""Why a server's scores are not ours: each known fault is imitated here, and the one that gives its scores is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from trsr_dist.config.sections import PromptSection
from trsr_dist.evaluate.parts import PartScorer
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.loading import ModelPrompts, load_weights, open_prompts, resolve_precision
from trsr_dist.model.recommender import Recommender
from trsr_dist.predict.ranker import choose_device, score
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.encoder import Encoder
from trsr_dist.records import Sample, TokenizedUser
from trsr_dist.rows import common_prefix_length

Ids = Sequence[int]
Scores = list[np.ndarray]
"""float32 log-odds, one array a user."""
Texts = dict[tuple[int, ...], str]
Change = Callable[[Ids], Ids | None]
"""What becomes of a prompt; None where a fault cannot befall it."""
EXPLAINED = 0.1
"""Share of the mean difference that an imitated fault may leave."""
NOISE = 3.0
"""Times the mean rounding of bfloat16 weights here that counts as 16-bit rounding there."""
CONSTANT = 1e-6
ALIKE = 0.98
"""Correlation of scores of nearly the same weights."""
WORDS = ("yes", "no"), ("Yes", "No"), ("YES", "NO"), ("true", "false")
BLANKS = ("", "\u2581", "\u0120")
"""How vocabularies write a blank before a word, and none."""
BOS_TWICE = "a second BOS token stands before the prompt; send token ids, or text with add_special_tokens=false"
NO_BOS = "the prompt's BOS token is not there; send token ids, or text with add_special_tokens=true"
NO_CUT = "serve with a larger --max-model-len and without truncation"
RIGHT_TEMPLATE = "send token ids, or the rendered text to /v1/completions"
LEAST_FITTED = 8
"""Scores that a line is fitted to."""
SAMPLED_USERS = 8
"""Whose prompts are scored again under each fault."""


@dataclass(frozen=True, slots=True)
class Local:
    """The model here, and how others are loaded beside it."""

    prompts: ModelPrompts
    model: Recommender
    row_tokens: int = 8192
    """Length limit of a packed row."""

    @classmethod
    def open(
        cls, name_or_path: str, device: str = "auto", precision: str = "auto", trust_remote_code: bool = False
    ) -> Local:
        """Load a model; arguments and errors as of ``Ranker.open``."""
        place = choose_device(device)
        prompts = open_prompts(name_or_path, PromptSection().model_dump(), trust_remote_code)
        dtype = getattr(torch, resolve_precision(precision, place))
        return cls(prompts, load_weights(prompts, place, dtype))

    def score(self, users: Sequence[TokenizedUser]) -> Scores:
        return score(self.model, self.row_tokens, users)

    def score_prompts(self, prompts: Sequence[Sequence[Ids]]) -> Scores:
        """Of prompts that need not share a prefix, a row of them each."""
        flat = [tuple(ids) for row in prompts for ids in row]
        users = [TokenizedUser("", ids[:-1], (ids[-1:],), (0,), ("",)) for ids in flat]
        ends = np.cumsum([len(row) for row in prompts])[:-1]
        return np.split(np.concatenate(self.score(users)), ends)

    def score_other(self, place: ModelPrompts, precision: torch.dtype, users: Sequence[TokenizedUser]) -> Scores:
        """By other weights, with this model's prompts and answers."""
        other = replace(place, builder=self.prompts.builder)
        return score(load_weights(other, self.model.device, precision), self.row_tokens, users)

    def score_words(self, users: Sequence[TokenizedUser], pairs: Sequence[tuple[int, int]]) -> list[Scores]:
        """The same prompts' log-odds of other tokens, one list a pair."""
        parts = [PartScorer(users, self.row_tokens) for _ in pairs]
        with torch.no_grad():
            for number, row in enumerate(parts[0].rows()):
                logits = self.model(RowInputs(row, self.model.device), "logits").float().cpu().numpy()
                for part, (yes, no) in zip(parts, pairs, strict=True):
                    part.take(number, logits[:, yes] - logits[:, no])
        return [part.scores() for part in parts]


def texts_of(builder: PromptBuilder, samples: Sequence[Sample], users: Sequence[TokenizedUser]) -> Texts:
    """The prompts as text, by their token ids; without those that were trimmed, which are token ids of no text."""
    found: Texts = {}
    for sample, user in zip(samples, users, strict=True):
        for text, ids in zip(builder.texts(sample), whole(user), strict=True):
            if builder.encode(text) == ids:
                found[tuple(ids)] = text
    return found


def whole(user: TokenizedUser) -> list[list[int]]:
    """All prompts of a user."""
    return [[*user.prefix, *suffix] for suffix in user.suffixes]


def prompt_faults(builder: PromptBuilder, texts: Texts, num_tokens: int) -> dict[str, Change]:
    """What a server may do to a prompt, by the words for it.

    Args:
        builder: of the prompts.
        texts: see ``texts_of``.
        num_tokens: that the server has read of the longest prompt; 0: unknown.
    """
    bos, eos = builder.tokenizer.bos_token_id, builder.tokenizer.eos_token_id
    faults: dict[str, Change] = {}
    if bos is not None:
        words = "a BOS token stands before the prompt that the training did not have; send token ids"
        faults |= {
            f"doubled BOS: {BOS_TWICE}": lambda ids: [bos, *ids] if ids[0] == bos else None,
            f"missing BOS: {NO_BOS}": lambda ids: ids[1:] if ids[0] == bos else None,
            words: lambda ids: [bos, *ids] if ids[0] != bos else None,
        }
    if eos is not None:
        faults["an end token is appended to the prompt; send token ids"] = lambda ids: [*ids, eos]
    if num_tokens:
        cut = f"prompts are cut to {num_tokens} tokens"
        faults |= {
            f"{cut}, their beginning is lost; {NO_CUT}": lambda ids: ids[-num_tokens:],
            f"{cut}, their end is lost; {NO_CUT}": lambda ids: ids[:num_tokens],
        }
    return faults | _template_faults(builder, texts)


def _template_faults(builder: PromptBuilder, texts: Texts) -> dict[str, Change]:
    tokenizer, own = builder.tokenizer, builder.encoder
    if not getattr(tokenizer, "chat_template", None):
        return {}
    plain = Encoder(tokenizer, "plain")
    chat = Encoder(tokenizer, "chat", builder.chat_template_kwargs)

    def of_text(change: Callable[[str], Ids]) -> Change:
        return lambda ids: None if (text := texts.get(tuple(ids))) is None else change(text)

    def message(text: str) -> str:
        return text[len(own.head) : len(text) - len(own.tail)]

    def rendered(text: str, **options: bool) -> Ids:
        messages = [{"role": "user", "content": message(text)}]
        return chat.ids([tokenizer.apply_chat_template(messages, tokenize=False, **options)])[0]

    faults = {"the chat template is put around it": of_text(lambda text: chat.ids([chat.head + text + chat.tail])[0])}
    if own.style == "chat":
        faults |= {
            "the chat template is missing": of_text(lambda text: plain.ids([message(text)])[0]),
            "the generation prompt is missing": of_text(partial(rendered, add_generation_prompt=False)),
            "prompt.chat_template_kwargs are missing": of_text(partial(rendered, add_generation_prompt=True)),
        }
    return {f"another template: {words}; {RIGHT_TEMPLATE}": change for words, change in faults.items()}


def diagnose(
    local: Local,
    users: Sequence[TokenizedUser],
    ours: Scores,
    theirs: Scores,
    read: Sequence[Sequence[Ids]],
    faults: Mapping[str, Change],
) -> str:
    """The fault behind a server's scores, in words.

    Args:
        local: the model here.
        users: their prompts.
        ours: log-odds here.
        theirs: log-odds there, finite.
        read: token ids that the server has read, by user and candidate; empty ones where it does not say.
        faults: of prompts, see ``prompt_faults``.
    """
    if all(np.ptp(row) < CONSTANT for row in theirs) and any(np.ptp(row) > CONSTANT for row in ours):
        return (
            f"constant scores: every candidate gets {theirs[0][0]:.4g}; the served head is not the trained one, or the "
            "server reads the same prompt or the wrong position each time"
        )
    flat, there = np.concatenate(ours), np.concatenate(theirs)
    if not np.isfinite(there).all():
        return f"scores that are not finite: {there[~np.isfinite(there)][0]}; serve in float32, or check the weights"
    told = [list(ids) for row in read for ids in row]
    is_told, wanted = all(told), [ids for user in users for ids in whole(user)]
    if is_told and told != wanted:
        return _named_prompts(local.prompts.builder, wanted, told, faults)
    if words := _rescaled(flat, there):
        return words
    some, rounding = slice(0, SAMPLED_USERS), ""
    for words, scores in _imitations(local, users[some], {} if is_told else faults):
        left = np.abs(np.concatenate(scores) - np.concatenate(theirs[some])).mean()
        differs = np.abs(np.concatenate(ours[some]) - np.concatenate(theirs[some])).mean()
        if left <= EXPLAINED * differs:
            return words
        noise = np.abs(np.concatenate(scores) - np.concatenate(ours[some])).mean()
        if words.startswith("16-bit") and differs <= NOISE * noise:
            rounding = f"{words} (mean difference {differs:.2g}, with bfloat16 weights here {noise:.2g})"
    if rounding:  # not at once: the base of a gentle adapter is as near, and gives the server's very scores
        return rounding
    alike = np.corrcoef(flat, there)[0, 1]
    near = "nearly the same scores: another checkpoint, or quantized weights" if alike > ALIKE else "other scores"
    return f"another adapter or other weights are served ({near}, correlation {alike:.3f}); serve the right folder"


def _rescaled(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Faults behind the model: what was made of its answer."""
    allowed = EXPLAINED * np.abs(ours - theirs).mean()
    with np.errstate(over="ignore"):
        probabilities = 1 / (1 + np.exp(-ours))
    known = {
        "swapped answer tokens: the server's scores are those of no; check the answers and the order of labels": -ours,
        "probabilities come back, not log-odds: the server applies a sigmoid and ignores use_activation=false; update "
        "it": probabilities,
    }
    for words, scores in known.items():
        if np.abs(scores - theirs).mean() <= allowed:
            return words
    if np.ptp(ours) > CONSTANT and len(ours) >= LEAST_FITTED:
        scale, shift = np.polyfit(ours.astype(np.float64), theirs.astype(np.float64), 1)
        if np.abs(scale * ours + shift - theirs).mean() <= allowed:
            return (
                f"scores are {scale:.4g} times ours {shift:+.4g}: a temperature, a penalty or a logit bias; serve with "
                "--logprobs-mode raw_logprobs and --generation-config vllm"
            )
    return ""


def _named_prompts(
    builder: PromptBuilder, wanted: list[list[int]], told: list[list[int]], faults: Mapping[str, Change]
) -> str:
    """The fault of prompts whose tokens the server tells."""
    for words, change in faults.items():
        if [change(ids) for ids in wanted] == told:
            return words
    ours, there = next((one, other) for one, other in zip(wanted, told, strict=True) if one != other)
    place = common_prefix_length([[*ours, -1], [*there, -2]])
    decode = builder.tokenizer.decode
    return (
        f"another template or tokenizer: from token {place} on the server reads {decode(there[place : place + 12])!r} "
        f"where the training has {decode(ours[place : place + 12])!r}; serve the merged folder's own tokenizer and "
        "template, or send token ids"
    )


def _imitations(
    local: Local, users: Sequence[TokenizedUser], faults: Mapping[str, Change]
) -> Iterator[tuple[str, Scores]]:
    """Faults in words, with the scores that they give; cheap ones first."""
    builder, place = local.prompts.builder, local.prompts
    for words, change in faults.items():
        changed = [[change(ids) for ids in whole(user)] for user in users]
        if all(ids for row in changed for ids in row) and changed != list(map(whole, users)):
            yield words, local.score_prompts(changed)
    pairs = _word_pairs(builder)
    for pair, scores in zip(pairs, local.score_words(users, list(pairs.values())) if pairs else [], strict=True):
        yield (
            f"wrong answer tokens: the server's scores are those of {pair}, the trained ones {builder.answer_ids}",
            scores,
        )
    yield (
        "16-bit rounding: serve with --dtype float32, or accept it with --tolerance",
        local.score_other(place, torch.bfloat16, users),
    )
    base = place.provenance.get("base", {}).get("name_or_path", "")
    if base and Path(base).is_dir():
        found = open_prompts(base, builder.settings, place.trust_remote_code)
        precision = next(local.model.parameters()).dtype
        words = "the base model is served, without the adapter; serve the merged folder, or name the adapter"
        yield words, local.score_other(found, precision, users)


def _word_pairs(builder: PromptBuilder) -> dict[str, tuple[int, int]]:
    """Tokens of other answers, by their words: other case, or with a blank before them (as tokenizers write it)."""
    vocabulary, found = builder.tokenizer.get_vocab(), {}
    for yes, no in (*WORDS, builder.answers):
        for blank in BLANKS:
            ids = (vocabulary.get(blank + yes), vocabulary.get(blank + no))
            if None not in ids and ids != builder.answer_ids:
                found[f"{blank + yes!r} and {blank + no!r}"] = ids
    return found
