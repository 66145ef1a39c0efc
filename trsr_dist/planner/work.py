"""What there is to do under a run's settings: tokens, pairs and rows of a split, from measured lengths or a sample of
prompts; prompts of the summarization, from the histories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.hashing import hash64
from trsr_dist.planner.flops import Workload, triangle
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import SummaryPrompt, recommend_instruction
from trsr_dist.records import Sample, TokenizedUser
from trsr_dist.rows import head_length
from trsr_dist.run import SPLITS
from trsr_dist.shards.codec import member_key
from trsr_dist.shards.lengths import SUMMARY, Lengths, Table, lengths_folder
from trsr_dist.shards.packing import attended_pairs, choose_candidates
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.plans import planner as scheme_of
from trsr_dist.summarize.plans.graph import node_prompt

SAMPLED_USERS = 8192
"""Samples whose measured lengths stand for all."""
TOKENIZED = 200
"""Samples that are tokenized where no lengths were measured."""
FILL = 0.98
"""Share of a row that packing fills."""
BYTES_PER_TOKEN = 4.0
"""Of English text under common tokenizers; used where no tokenizer is at hand."""
SUMMARIZED = 300
"""Users of a split whose summaries stand for all."""

Source = Literal["measured", "sampled", "histories"]


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Lengths of some users' prompts, who stand for a split."""

    table: Table
    keys: np.ndarray
    """uint64, shape (num_samples,): a hash of each user."""
    head: int
    """Tokens that all prompts begin with."""
    num_users: int
    """Of the whole split."""
    source: Source


@dataclass(frozen=True, slots=True)
class SplitWork:
    """One pass over a split."""

    num_users: int
    shared: Workload
    """In rows, shared parts once."""
    separate: Workload
    """The same prompts as sequences of their own."""
    num_rows: int
    source: Source
    """``measured`` lengths of the shards, a sample of the shards' prompts, or of prompts made from ``histories``."""


def shard_lengths(folder: Path, builder: PromptBuilder, url: str) -> PromptLengths:
    """Lengths of a split's shards.

    Args:
        folder: ``RUN/shards/{split}``.
        builder: writes the prompts.
        url: of the tars, where they are in a store; else empty.

    Raises:
        RunError: the split is not there.
        DataError: a sample is damaged.
    """
    shards = ShardSet(folder, url=url)
    measured = lengths_folder(shards, builder)
    if (measured / SUMMARY).is_file():
        lengths = Lengths(shards, measured)
        table = lengths.table([(0, min(len(shards), SAMPLED_USERS))])
        keys = shards.keys(0, len(table.samples))
        return PromptLengths(table, keys, lengths.facts.head_tokens, len(shards), "measured")
    size = min(len(shards), TOKENIZED)
    users = [builder.build(shards.read(index)) for index in range(size)]
    return _tokenized(users, shards.keys(0, size), len(shards), "sampled")


def history_lengths(
    store: HistoryStore,
    split: str,
    builder: PromptBuilder,
    domain: str,
    summary_of: Callable[[Sequence[str]], str],
    num_recent: int,
) -> PromptLengths:
    """Lengths of the prompts that a split's users will have once their summaries are written.

    Args:
        store: histories.
        split: which.
        builder: writes the prompts.
        domain: wording of the prompts.
        summary_of: from the texts of a history, oldest first, to a text as long as its summary.
        num_recent: items that a sample shows in full.
    """
    size = min(store.num_users(split), TOKENIZED)
    rows = [store.user(split, index) for index in range(size)]
    users = [builder.build(expected_sample(store, row, domain, summary_of, num_recent)) for row in rows]
    keys = np.array([hash64(member_key(row.user)) for row in rows], dtype=np.uint64)
    return _tokenized(users, keys, store.num_users(split), "histories")


def placeholder_text(history: Sequence[str], num_bytes: int) -> str:
    """The beginning of a history, again and again, in place of a summary of this size in bytes."""
    text = " ".join(history)
    copies = -(-num_bytes // max(1, len(text.encode())))
    return " ".join([text] * copies).encode()[:num_bytes].decode(errors="ignore")


def expected_sample(
    store: HistoryStore, row: UserRow, domain: str, summary_of: Callable[[Sequence[str]], str], num_recent: int
) -> Sample:
    """A user's sample, as far as it is known before the summary is written; arguments as of ``history_lengths``."""
    history = [store.catalogue.text(item) for item in row.history]
    recent = tuple(history[-num_recent:]) if num_recent else ()
    return Sample(row.user, recommend_instruction(domain), summary_of(history), recent, store.candidates(row))


def _tokenized(users: Sequence[TokenizedUser], keys: np.ndarray, num_users: int, source: Source) -> PromptLengths:
    """Lengths of tokenized users, as they would be measured."""
    counts = [len(user.suffixes) for user in users]
    table = Table(
        samples=np.arange(len(users)),
        prefixes=np.array([len(user.prefix) for user in users], dtype=np.int64),
        trimmed=np.zeros(len(users), dtype=bool),
        starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
        suffixes=np.array([len(suffix) for user in users for suffix in user.suffixes], dtype=np.int64),
        labels=np.array([label > 0 for user in users for label in user.labels], dtype=bool),
    )
    return PromptLengths(table, keys, head_length([user.prefix for user in users]), num_users, source)


def split_work(lengths: PromptLengths, row_tokens: int, negatives: int | None, seed: int) -> SplitWork:
    """The work of a pass over a split.

    Args:
        lengths: of some of its users' prompts.
        row_tokens: of a row.
        negatives: drawn per positive; None: all candidates.
        seed: of the draw.
    """
    table, size = lengths.table, len(lengths.table.samples)
    chosen = np.ones(len(table.suffixes), dtype=bool)
    if negatives is not None:
        chosen = choose_candidates(lengths.keys, table.starts, table.labels, negatives, seed)
    owner, suffixes = table.owner[chosen], table.suffixes[chosen]
    sums, squares, counts = (
        np.bincount(owner, weights=weights, minlength=size) for weights in (suffixes, suffixes**2, None)
    )
    units = table.prefixes + sums - lengths.head
    rows = max(1.0, units.sum() / (FILL * max(1, row_tokens - lengths.head)))
    whole = table.prefixes[owner] + suffixes
    separate = Workload(int(whole.sum()), int((whole * (whole + 1) // 2).sum()), int(counts.sum()), size)
    pairs = attended_pairs(table.prefixes, sums, squares).sum()
    shared = Workload(round(units.sum() + rows * lengths.head), round(pairs), int(counts.sum()), size)
    factor = lengths.num_users / max(1, size)
    return SplitWork(
        lengths.num_users,
        shared.scaled(factor),
        separate.scaled(factor),
        max(1, round(rows * factor)),
        lengths.source,
    )


@dataclass(frozen=True, slots=True)
class SummarySettings:
    """What the prompts depend on, beside the histories."""

    scheme: str
    block_size: int
    fan_in: int
    max_prompt_tokens: int
    max_new_tokens: int
    users_per_unit: int
    domain: str
    num_in_flight: int
    engine: str
    precision: str = "auto"
    """Of the model's weights."""
    samples: int = 0
    """Above 0: this many summaries of each train user, in place of one for the users of all splits."""

    @property
    def most_tokens(self) -> int:
        """Of a prompt with its answer."""
        return self.max_prompt_tokens + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class SummaryWork:
    """Prompts of all splits, or of all samples."""

    num_users: int
    num_units: int
    """Of users, each worked on by one task."""
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    """At most: every summary as long as it may be."""
    pairs: int
    """Query-key pairs of the prompts."""


def summary_work(store: HistoryStore, settings: SummarySettings) -> SummaryWork:
    """Estimated from the first users of each split; tokens by the length of the texts."""
    totals = [0.0] * 4
    splits, copies = (("train",), settings.samples) if settings.samples else (SPLITS, 1)
    for split in splits:
        users = store.first_users(split, SUMMARIZED)
        factor = copies * store.num_users(split) / max(1, sum(map(len, users)))
        for samples in users:
            histories = [[store.catalogue.text(item) for item in sample.history] for sample in samples]
            for tokens in summary_prompt_tokens(histories, settings):
                for place, count in enumerate((1, tokens, settings.max_new_tokens, triangle(tokens))):
                    totals[place] += factor * count
    num_users = [store.num_users(split) for split in splits]
    num_units = copies * sum(-(-users // settings.users_per_unit) for users in num_users)
    return SummaryWork(sum(num_users), num_units, *(round(total) for total in totals))


def summary_prompt_tokens(histories: Sequence[Sequence[str]], settings: SummarySettings) -> Iterator[int]:
    """Estimated tokens of the prompts for a user's samples, each prompt once; summaries that they read are taken for as
    long as they may be."""
    summary = "x" * round(settings.max_new_tokens * BYTES_PER_TOKEN)
    numbers: dict[SummaryPrompt, str] = {}  # which stand for the texts
    for items in histories:
        texts: list[str] = []
        for node in scheme_of(settings.scheme)(len(items), settings.block_size, settings.fan_in):
            prompt = node_prompt(node, items, [texts[parent] for parent in node.parents], settings.domain)
            is_new = prompt not in numbers
            texts.append(numbers.setdefault(prompt, str(len(numbers))))
            if is_new:
                written = replace(prompt, previous=(summary,) * len(node.parents)).text()
                yield min(settings.max_prompt_tokens, round(len(written.encode()) / BYTES_PER_TOKEN))
