"""Looks into the shards of one split, or of all splits of a run, and says what it found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trsr_dist.errors import DataError, TrsrError
from trsr_dist.log import show
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.prompts.text import recommend_text
from trsr_dist.records import Sample
from trsr_dist.run import MANIFEST, read_manifest
from trsr_dist.shards.inspect.content import (
    TRAIN,
    Findings,
    ItemFacts,
    SplitContent,
    judge_content,
    judge_lessons,
    judge_overlaps,
    read_content,
)
from trsr_dist.shards.inspect.verify import index_split, verify_split
from trsr_dist.shards.lengths import Lengths
from trsr_dist.shards.measure import Share, measure_lengths
from trsr_dist.shards.plan import PackingSettings, TrainPlan, epoch_facts
from trsr_dist.shards.reader import ShardSet

ORDER = ("train", "valid", "test")
BAR_WIDTH = 40
SHOWN_CANDIDATES = 2
FREQUENT = 0.01
"""Share of the items whose share of the targets tells how uneven they are."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """How prompts are tokenized and packed, and with it what a split is under one tokenizer."""

    builder: PromptBuilder
    packing: PackingSettings
    num_workers: int = 0
    """Processes that measure lengths; 0: this one."""

    def describe(self, shards: ShardSet, is_train: bool) -> Iterator[str]:
        """Lines on lengths, trims and, for the train split, steps; lengths are measured where missing."""
        lengths = measure_lengths(shards, self.builder, Share(num_workers=self.num_workers), tolerate=True)
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


@dataclass(frozen=True, slots=True)
class Options:
    """What to do beside looking at the samples."""

    index: bool = False
    """Build missing indexes and manifests first."""
    verify: bool = False
    """Check every byte."""
    num_samples: int = 1
    """Samples to show of each split."""
    tokens: Tokens | None = None
    """None: what needs a tokenizer is left out."""
    items: ItemFacts | None = None
    """Of the run's items; None: what needs them is left out."""
    lessons: Path | None = None
    """What the summarizer has learned from; None: nothing that is known of."""


def inspect_shards(folder: Path, options: Options) -> int:
    """Print what is in the shards below ``folder``; returns 1 where something is wrong, else 0.

    Raises:
        DataError: there are no shards.
    """
    folders = split_folders(folder)
    if options.index:
        for path in folders:
            index_split(path)
    findings = Findings()
    if options.verify:
        for path in folders:
            problems, num_bytes = verify_split(path)
            findings.errors += problems
            show(f"{path}: verified {num_bytes:,} bytes of tars with their indexes")
    shards = {path.name: opened for path in folders if (opened := _open(path, findings)) is not None}
    contents = {name: read_content(opened, name, options.items) for name, opened in shards.items()}
    for name, content in contents.items():
        show("\n".join(_describe(content, shards[name], options, findings)) + "\n")
        judge_content(content, shards[name], findings)
    judge_overlaps(contents, shards, findings)
    if options.lessons is not None:
        judge_lessons(options.lessons, contents, findings)
    show("\n".join([*_left_out(contents, options), *findings.lines()]))
    return 1 if findings.errors else 0


def split_folders(folder: Path) -> list[Path]:
    """``folder`` itself where it is a split, else the splits in it.

    Raises:
        DataError: it is neither.
    """
    if _is_split(folder):
        return [folder]
    found = [path for path in folder.iterdir() if path.is_dir() and _is_split(path)] if folder.is_dir() else []
    if not found:
        raise DataError(f"{folder}: no shards (*.tar) here or one level below; give a split's folder or RUN/shards")
    return sorted(found, key=lambda path: (ORDER.index(path.name) if path.name in ORDER else len(ORDER), path.name))


def _is_split(folder: Path) -> bool:
    has_shards = any(folder.glob("*.tar")) or (folder / MANIFEST).is_file() and "shards" in read_manifest(folder)
    return has_shards and not folder.name.startswith(".")


def _open(folder: Path, findings: Findings) -> ShardSet | None:
    try:
        return ShardSet(folder, any_wording=True)
    except TrsrError as error:
        findings.errors.append(f"{error} (tars from elsewhere: tools/inspect_shards.py --index)")
        return None


def _describe(content: SplitContent, shards: ShardSet, options: Options, findings: Findings) -> Iterator[str]:
    """All lines on one split."""
    sizes = [facts["num_samples"] for facts in shards.facts]
    num_bytes = np.array([facts["num_bytes"] for facts in shards.facts])
    yield f"{shards.folder}: {len(shards):,} users in {len(sizes):,} shards, {num_bytes.sum():,} bytes"
    if not sizes:
        return
    yield (
        f"shards           {min(sizes):,} to {max(sizes):,} users; the largest has "
        f"{num_bytes.max() / num_bytes.mean():.2f} times the mean bytes"
    )
    if content.users:
        yield from _describe_candidates(content)
    if options.tokens is not None:
        try:
            yield from options.tokens.describe(shards, content.name == TRAIN)
        except TrsrError as error:
            findings.errors.append(f"{content.name}: {error}")
    else:
        yield "bytes of a sample"
        yield from histogram(shards.sizes(0, len(shards)))
    for index in content.indices[: options.num_samples]:
        sample = shards.read(index)
        yield f"sample {index}, user {sample.user!r}:"
        shown = options.tokens.show(sample) if options.tokens is not None else show_text(sample)
        yield from (f"  | {line}" for text in shown for line in text.splitlines())


def _describe_candidates(content: SplitContent) -> Iterator[str]:
    positives, negatives = np.array(content.positives), np.array(content.negatives)
    both = positives + negatives
    yield (
        f"candidates       {both.min()} to {both.max()} a user, {both.mean():.1f} on average; {positives.sum():,} yes "
        f"and {negatives.sum():,} no, {positives.sum() / both.sum():.1%} yes"
    )
    counts = sorted(content.target_counts.values(), reverse=True)
    if counts:
        frequent = max(1, round(FREQUENT * len(counts)))
        yield (
            f"targets          {len(counts):,} items; the {frequent:,} most frequent make up "
            f"{sum(counts[:frequent]) / sum(counts):.1%} of all targets"
        )
    if content.shortcuts is not None:
        for shortcut in content.shortcuts.measured:
            yield f"AUC              {shortcut.auc:.3f} +- {shortcut.error:.3f} by {shortcut.name} alone"
        if content.shortcuts.num_unknown:
            yield f"                 {content.shortcuts.num_unknown:,} candidates are not among the histories' items"


def _left_out(contents: dict[str, SplitContent], options: Options) -> Iterator[str]:
    """What this look did not cover."""
    if options.tokens is None:
        yield "left out: token lengths, trims and steps (give --config C or --tokenizer DIR)"
    if options.items is None:
        yield "left out: AUC of popularity and item age (no RUN/histories beside the shards)"
    elif contents and not any(len(content.shortcuts.measured) > 1 for content in contents.values()):
        yield "left out: AUC of item age (the data has no times)"
    if len(contents) < 2:
        yield "left out: comparisons between splits (give RUN/shards)"
    if not options.verify:
        yield "left out: bytes outside the samples (give --verify)"


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
