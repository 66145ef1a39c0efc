"""From texts to tokens and summaries: users a CPU-second under real tokenizers, against whole prompts one by one.

Real tokenizers are those in ``TOKENIZERS``, where that folder is there; else a small one is made. Titles are made of
invented words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.common import Row, rate_row, ratio_row, timed
from benchmarks.stream import _tokenizer as made_tokenizer
from trsr_dist.pretrained import BaseSource, load_tokenizer
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import SummaryPrompt, recommend_instruction
from trsr_dist.records import Candidate, Sample
from trsr_dist.summarize.extract import extract, item_terms

TOKENIZERS = Path.home() / ".cache" / "trsr_dist" / "tokenizers"
NUM_CANDIDATES, NUM_RECENT = 21, 5
SUMMARY_WORDS = 70
"""With five recent items and the instruction a prefix of about 350 tokens."""
NUM_ITEMS = 5000
NUM_USERS = 400
"""Of a round."""
WHOLE_USERS = 20
"""Tokenized whole, which takes ten times as long."""
ROUNDS = 3
MANY = 1000
BLOCK, MAX_WORDS = 10, 60
"""Items of a block and words of a summary, in the recurrent scheme."""


def run(scale: float) -> list[Row]:
    """All measurements; ``scale`` multiplies the users."""
    titles = list(_titles())
    stream = Random(0)
    num_users = max(20, round(NUM_USERS * scale))
    rows = []
    for name, tokenizer in _tokenizers():
        rows += tokenizing(name, tokenizer, titles, stream, num_users)
    return rows + extracting(titles, stream, num_users)


def tokenizing(name: str, tokenizer: Any, titles: Sequence[str], stream: Random, num_users: int) -> list[Row]:
    """Ours and whole prompts in turns, each round with new users of the same items."""
    builder = PromptBuilder(tokenizer, max_tokens=4096)
    builder.build(make_user(titles, stream))
    users = [make_user(titles, stream) for _ in range(num_users)]
    with timed() as first:
        built = [builder.build(user) for user in users]
    prefix = sum(len(user.prefix) for user in built) / num_users
    suffix = sum(len(suffix) for user in built for suffix in user.suffixes) / num_users / NUM_CANDIDATES
    ours, whole = [], []
    for _ in range(ROUNDS):
        users = [make_user(titles, stream) for _ in range(num_users)]
        with timed() as timer:
            for user in users:
                builder.build(user)
        ours.append(timer.cpu / num_users)
        texts = [
            builder.render(user.instruction, user.summary, user.recent, item.text)
            for user in users[:WHOLE_USERS]
            for item in user.candidates
        ]
        with timed() as timer:
            for text in texts:
                tokenizer(text, add_special_tokens=builder.style == "plain")
        whole.append(timer.cpu / len(users[:WHOLE_USERS]))
    case = f"{name}, {NUM_CANDIDATES} candidates, prefix {prefix:.0f}, suffixes {suffix:.0f}"
    return [
        Row("data", case, f"the first {num_users} users", num_users / first.cpu, "users/CPU-s"),
        rate_row("data", case, f"the next {num_users}", 1, ours, "users/CPU-s"),
        rate_row("data", case, "whole prompts one by one", 1, whole, "users/CPU-s"),
        ratio_row("data", case, "whole / ours", whole, ours),
        *_trimming(name, tokenizer, titles, stream),
    ]


def _trimming(name: str, tokenizer: Any, titles: Sequence[str], stream: Random) -> list[Row]:
    """A user of many candidates whose prompts are cut, and an item of a megabyte."""
    user = make_user(titles, stream, min(MANY, len(titles)), 10 * SUMMARY_WORDS)
    big = " ".join(f"word{number % 700}" for number in range(130_000))
    item = make_user(titles, stream)
    item = replace(item, candidates=(*item.candidates, Candidate("big", big, 0)))
    seconds = []
    for sample, max_tokens in ((user, 600), (item, 4096)):
        builder = PromptBuilder(tokenizer, max_tokens=max_tokens)
        builder.build(make_user(titles[:NUM_CANDIDATES], stream))
        with timed() as timer:
            trims = builder.build(sample).trims
        assert trims
        seconds.append(timer.cpu)
    return [
        Row("data", f"{name}, {len(user.candidates)} candidates", "one user, trimmed", seconds[0], "CPU-s"),
        Row("data", f"{name}, an item of 1 MB", "one user", seconds[1], "CPU-s"),
    ]


def extracting(titles: Sequence[str], stream: Random, num_users: int) -> list[Row]:
    """Extractive summaries of 26 items in three steps, each of the last summary and the next block."""
    item_terms.cache_clear()
    seconds = []
    for _ in range(ROUNDS + 1):
        histories = [stream.sample(titles, 26) for _ in range(num_users)]
        with timed() as timer:
            for history in histories:
                previous: tuple[str, ...] = ()
                for start in range(0, len(history), BLOCK):
                    block = tuple(history[start : start + BLOCK])
                    previous = (extract(SummaryPrompt("", previous, block), MAX_WORDS),)
        seconds.append(timer.cpu / num_users)
    case = "extractive summaries, 26 items in blocks of 10"
    return [
        Row("data", case, f"the first {num_users} users", 1 / seconds[0], "users/CPU-s"),
        rate_row("data", case, f"the next {num_users}", 1, seconds[1:], "users/CPU-s"),
    ]


def make_user(
    titles: Sequence[str], stream: Random, num_candidates: int = NUM_CANDIDATES, summary_words: int = SUMMARY_WORDS
) -> Sample:
    """A user with items and a summary of the titles' words."""
    words = " ".join(stream.choices(titles, k=summary_words)).split()[:summary_words]
    items = stream.sample(titles, num_candidates)
    candidates = tuple(Candidate(str(number), text, int(number == 0)) for number, text in enumerate(items))
    recent = tuple(stream.sample(titles, NUM_RECENT))
    return Sample("user", recommend_instruction("news"), " ".join(words), recent, candidates)


def _tokenizers() -> Iterator[tuple[str, Any]]:
    paths = sorted(TOKENIZERS.glob("*/tokenizer.json"))
    for path in paths:
        yield path.parent.name, load_tokenizer(BaseSource(str(path.parent)))
    if not paths:
        yield "a made tokenizer", made_tokenizer()


def _titles() -> Iterator[str]:
    stream = Random(1)
    words = [
        "".join(stream.choices(("ta", "ren", "mi", "os", "el", "ku"), k=stream.randint(1, 4))) for _ in range(3000)
    ]
    for number in range(NUM_ITEMS):
        title = " ".join(stream.choices(words, [1 / rank for rank in range(1, 3001)], k=12))
        yield f"category: {words[number % 20]}; subcategory: {words[number % 100]}; title: {title} {number}"
