"""Of several sampled summaries of a train user the one that the ranker ranks best with: what a summarizer learns from.

After RLPF (arXiv 2409.04421), where a summary's reward is how well a frozen model predicts the user's next action from
it; here the best of n samples is imitated, or preferred to the worst, in place of reinforcement learning.

RUN/samples/chosen/
    sft/train.jsonl    prompt and completion of every text of the best sample
    dpo/train.jsonl    prompt, chosen and rejected, wherever best and worst sample answer the same prompt
    manifest.json

The samples are of train users by construction, and the chosen texts go into no shard: a summary that was chosen by a
user's target would tell the ranker of it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trsr_dist.config import Config, dump_config
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import ConfigError, DataError
from trsr_dist.evaluate.teacher import plan_scoring
from trsr_dist.files import atomic_file, atomic_folder, writing
from trsr_dist.hashing import hash64
from trsr_dist.locks import folder_lock
from trsr_dist.log import setup_logging, show
from trsr_dist.prompts.encoder import for_any_tokenizer
from trsr_dist.records import Sample
from trsr_dist.run import RunFolder, is_finished, write_manifest
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.tables import CandidateTable, open_table
from trsr_dist.summarize.cache import TextCache, prompt_hash
from trsr_dist.summarize.plans import planner
from trsr_dist.summarize.plans.graph import node_prompt

KINDS = ("sft", "dpo")


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request to the summarizer and what it wrote."""

    prompt: str
    text: str
    was_trimmed: bool
    """The model read less than ``prompt``."""


@dataclass(frozen=True, slots=True)
class SampleSet:
    """One sampled summary of each train user, with the ranker's scores."""

    shards: ShardSet
    table: CandidateTable
    texts: TextCache

    def exchanges(self, sample: Sample, items: Sequence[str]) -> list[Exchange]:
        """The requests behind a user's summary, in the plan's order; none where it failed.

        Raises:
            DataError: a text is no longer in the journal, or the prompts are another version's.
        """
        settings, nodes, found, texts = self.shards.manifest["settings"], sample.provenance["nodes"], [], []
        plan = planner(settings["scheme"])(len(items), settings["block_size"], settings["fan_in"]) if nodes else ()
        for node, (*_, key, hashed) in zip(plan, nodes, strict=True):
            record = self.texts.get(key)
            prompt = node_prompt(node, items, [texts[parent] for parent in node.parents], settings["domain"])
            if record is None or prompt_hash(prompt) != hashed:
                raise DataError(
                    f"{self.texts.folder}: without the text {key} of user {sample.user!r}, or its prompt has changed; "
                    f"remove {self.shards.folder} and run launch/summarize.py again"
                )
            texts.append(record["text"])
            written = str(for_any_tokenizer(prompt.prompt()))
            found.append(Exchange(written, record["text"], bool(record.get("words_cut"))))
        return found


def choose_summaries(config: Config, model: str, min_gain: float, force: bool = False, dry_run: bool = False) -> int:
    """Run the job; see tools/choose_summaries.py.

    Args:
        config: of the run, with the ``summarize.samples`` that were written.
        model: whose scores of them ``tools/score_shards.py`` has put there.
        min_gain: users are left out whose best sample is not better than their worst by this many nats.
        force: replace a choice by other scores or settings.
        dry_run: say what would be chosen from, and touch nothing.

    Raises:
        ConfigError: there are fewer than two samples to choose from.
        RunError: the model has not scored them, or a choice of other settings is there.
        DataError: shards, scores or texts are damaged or do not belong together.
    """
    setup_logging(stage="choose")
    if config.summarize.samples < 2:
        raise ConfigError(f"summarize.samples={config.summarize.samples}: a choice needs two or more of each user")
    run = RunFolder(Path(config.run.dir))
    folder = run.samples / "chosen"
    if dry_run:
        show(f"{dump_config(config)}\nsummaries chosen from {config.summarize.samples} of each train user: {folder}")
        return 0
    with writing(folder), folder_lock(folder) as lock, ExitStack() as stack:
        sets = []
        for opened in open_sets(config, model):
            stack.callback(opened.texts.close)
            sets.append(opened)
        settings = {"min_gain": min_gain, "scores": [one.table.sha256 for one in sets]}
        inputs = {f"sample_{number:03d}": one.shards.manifest_hash for number, one in enumerate(sets)}
        if is_finished(folder, settings, inputs, force):
            show(f"{folder}: already chosen with these settings; nothing to do (--force redoes it)")
            return 0
        with atomic_folder(folder, lock.check) as new:
            facts = write_choice(new, sets, HistoryStore(run.histories), min_gain)
            write_manifest(new, "choose", settings, inputs, **facts)
    show(f"{folder}: {json.dumps(facts)}")
    return 0


def open_sets(config: Config, model: str) -> Iterator[SampleSet]:
    """The samples of the config with the model's scores of them.

    Raises:
        RunError: one has not been written or scored.
        DataError: they have other users, or one is damaged.
    """
    first = None
    for job, shards in plan_scoring(config, model):
        remedy = f"run tools/score_shards.py with this config and --model {model}"
        table = open_table(job.folder, shards.manifest_hash, remedy)
        first = first or shards
        if shards.candidate_hash != first.candidate_hash:
            raise DataError(
                f"{shards.folder}: has not the users of {first.folder}, since some failed in one of them; set "
                "summarize.failed_users=recent_only, remove both and run launch/summarize.py again"
            )
        yield SampleSet(shards, table, TextCache(job.run.summaries / "journal", "choose"))


def write_choice(folder: Path, sets: Sequence[SampleSet], store: HistoryStore, min_gain: float) -> dict[str, Any]:
    """Choose for every user and write what is learned from it; returns counts and mean rewards."""
    rows = {item: row for row, item in enumerate(store.catalogue.ids)}
    counts: Counter[str] = Counter()
    taught: set[int] = set()
    rewards = np.empty((len(sets[0].shards), len(sets)))
    with ExitStack() as stack:
        files = {kind: stack.enter_context(atomic_file(folder / kind / "train.jsonl")) for kind in KINDS}
        for index, reward in enumerate(rewards):
            samples = [one.shards.read(index) for one in sets]
            is_positive = np.array([candidate.label > 0 for candidate in samples[0].candidates])
            reward[:] = [target_log_share(one.table.values[index, : len(is_positive)], is_positive) for one in sets]
            best, worst = int(reward.argmax()), int(reward.argmin())
            if reward[best] - reward[worst] <= min_gain:
                continue
            items = [store.catalogue.text(rows[item]) for item in samples[0].provenance["history"]]
            told = (sets[number].exchanges(samples[number], items) for number in (best, worst))
            learned = list(lessons(sets[best].shards.manifest["settings"]["summarizer"], *told))
            if store.has_earlier:  # a user's samples ask for the same texts: the first one teaches them
                keys = [hash64(kind, json.dumps(line["prompt"])) for kind, line in learned]
                learned = [lesson for lesson, key in zip(learned, keys, strict=True) if key not in taught]
                taught.update(keys)
            counts["users"] += bool(learned)  # none from a user whose best sample has no summary
            for kind, line in learned:
                counts[kind] += 1
                files[kind].write(json.dumps({"user": samples[0].user, **line}, ensure_ascii=False) + "\n")
    means = {"best": rewards.max(1), "mean": rewards, "worst": rewards.min(1)}
    return dict(counts) | {f"reward_{name}": round(float(values.mean()), 4) for name, values in means.items()}


def target_log_share(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The reward: log of a target's share among itself and the negatives, as the listwise loss has it, in nats.

    Args:
        scores: float32 log-odds, shape (num_candidates,).
        is_positive: bool, shape (num_candidates,).

    Returns:
        The mean over the targets; at most 0.
    """
    negatives = np.logaddexp.reduce(scores[~is_positive].astype(np.float64))
    targets = scores[is_positive].astype(np.float64)
    return float((targets - np.logaddexp(targets, negatives)).mean())


def lessons(
    summarizer: dict[str, Any], best: Sequence[Exchange], worst: Sequence[Exchange]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and line of each lesson, in TRL's formats. A prompt that was trimmed teaches nothing: it is not what the
    model read."""
    for exchange in best:
        if not exchange.was_trimmed:
            yield "sft", _line(summarizer, prompt=exchange.prompt, completion=exchange.text)
    for good, bad in zip(best, worst, strict=False):
        if good.prompt == bad.prompt and good.text != bad.text and not good.was_trimmed:
            yield "dpo", _line(summarizer, prompt=good.prompt, chosen=good.text, rejected=bad.text)


def _line(summarizer: dict[str, Any], prompt: str, **answers: str) -> dict[str, Any]:
    if summarizer["prompt_style"] == "plain":
        return {"prompt": prompt} | {name: f" {text}" for name, text in answers.items()}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    variables = {"chat_template_kwargs": kwargs} if (kwargs := summarizer["chat_template_kwargs"]) else {}
    return {"prompt": [{"role": "user", "content": prompt}], **turns, **variables}
