"""What a split is under one tokenizer: lengths, trims, the rows and steps of an epoch, decoded prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import recommend_text
from trsr_dist.records import Sample
from trsr_dist.shards.counts import epoch_facts
from trsr_dist.shards.lengths import Lengths
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan
from trsr_dist.shards.reader import ShardSet

BAR_WIDTH = 40
SHOWN_CANDIDATES = 2


@dataclass(frozen=True, slots=True)
class Tokens:
    """How prompts are tokenized and packed."""

    builder: PromptBuilder
    packing: PackingSettings
    num_workers: int = 0
    """Processes that measure lengths; 0: this one."""

    def describe(self, shards: ShardSet, is_train: bool) -> Iterator[str]:
        """Lines on lengths, trims and, for the train split, steps; lengths are measured where missing."""
        lengths = measure_lengths(shards, self.builder, num_workers=self.num_workers, tolerate=True)
        facts = lengths.facts
        yield f"token lengths    {lengths.folder.name}: prompts, each with one candidate"
        yield from histogram(prompt_lengths(lengths))
        trims = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in facts.trimmed_users.items() if count)
        yield f"trimmed users    {trims or 'none'}"
        yield f"shared           all prompts begin with the same {facts.head_tokens} tokens, which a row holds once"
        if is_train and facts.num_candidates:
            yield from self._steps(lengths)

    def show(self, sample: Sample) -> Iterator[str]:
        """A sample's prompts as the model reads them, back from their token ids."""
        user = self.builder.build(sample)
        yield self.builder.tokenizer.decode(user.prefix)
        for suffix, label in list(zip(user.suffixes, user.labels, strict=True))[:SHOWN_CANDIDATES]:
            yield f"+ {self.builder.tokenizer.decode(suffix)!r}, {len(suffix)} tokens, label {label}"

    def _steps(self, lengths: Lengths) -> Iterator[str]:
        settings = self.packing
        facts = epoch_facts(TrainPlan(lengths, settings), epoch=0)
        yield (
            f"first epoch      {facts.num_steps} steps of {settings.rows_per_step} rows: {facts.num_rows} rows of "
            f"{settings.row_tokens} tokens, {facts.fill:.1%} full, {settings.negatives_per_positive} negatives a "
            f"positive, {facts.num_chunks} chunks beyond users' first"
        )


def show_text(sample: Sample) -> Iterator[str]:
    """A sample's first prompt, where there is no tokenizer."""
    first = sample.candidates[0]
    yield recommend_text(sample.instruction, sample.summary, sample.recent, first.text)
    yield f"label {first.label}, {len(sample.candidates) - 1} further candidates"


def prompt_lengths(lengths: Lengths) -> np.ndarray:
    """int64, shape (num_candidates,): tokens of every prompt."""
    starts = lengths.shards.starts.tolist()
    tables = (lengths.table([run]) for run in zip(starts[:-1], starts[1:], strict=True))
    parts = [table.prefixes[table.owner] + table.suffixes for table in tables]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def histogram(values: np.ndarray, num_bins: int = 10) -> Iterator[str]:
    """Lines of a histogram over equal ranges, and the quantiles."""
    if not len(values):
        return
    edges = np.unique(np.linspace(values.min(), values.max() + 1, num_bins + 1).astype(np.int64))
    counts, _ = np.histogram(values, edges)
    for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        bar = "#" * -(-BAR_WIDTH * count // int(counts.max()))
        yield f"  {low:>6} to {high - 1:<6} {bar:<{BAR_WIDTH}} {count}"
    median, late = np.quantile(values, [0.5, 0.99])
    yield f"  mean {values.mean():.1f}, median {median:.0f}, 99 % {late:.0f}, longest {values.max()}"
