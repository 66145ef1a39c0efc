"""The progress of a run, read from its folder: stages, the summarization's tasks, the training's ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trsr_dist.errors import DataError, RunError
from trsr_dist.evaluate.passes import split_parts
from trsr_dist.evaluate.score_files import IDENTITY, ScoreFolder
from trsr_dist.files import read_json
from trsr_dist.liveness import reader_time
from trsr_dist.metric_log import MetricRow, read_metrics
from trsr_dist.model.artifacts import PROVENANCE
from trsr_dist.printable import in_one_line
from trsr_dist.run import MANIFEST, SPLITS, RunFolder
from trsr_dist.summarize.progress import ProgressReader, TaskProgress
from trsr_dist.train.lifecycle import BEAT_SECONDS, describe_ranks, read_heartbeats

SHOWN_FAILURES = 5
SHOWN_CHARACTERS = 500
SILENT_BEATS = 4
"""A rank that has missed this many beats has ended."""


def describe_run(root: Path) -> str:
    """The state of a run folder in lines of text.

    Raises:
        RunError: there is no such folder.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such run folder; give the run.dir of a config")
    run, now = RunFolder(root), reader_time(root)
    is_prepared, is_merged = (run.histories / MANIFEST).is_file(), (run.merged / "config.json").is_file()
    lines = [
        f"prepare     {f'done: {run.histories}' if is_prepared else 'not done'}",
        *_summarized(run, now),
        *_trained(run, now),
        f"merge       {f'done: {run.merged}' if is_merged else 'not done'}",
        *_evaluated(run),
    ]
    return "\n".join(lines)


def _summarized(run: RunFolder, now: float) -> Iterator[str]:
    reader = ProgressReader.latest(run)
    if reader is None:
        done = all((run.split(split) / MANIFEST).is_file() for split in SPLITS)
        yield f"summarize   {'done' if done else 'not begun'}"
    else:
        yield from _job("summarize", reader, now)
    for folder in sorted(run.samples.glob("[0-9]*")):
        if (reader := ProgressReader.latest(RunFolder(folder))) is not None:
            yield from _job(f"sample {folder.name}", reader, now)


def _job(name: str, reader: ProgressReader, now: float) -> Iterator[str]:
    overview = reader.read()
    working, eta = sum(task.state == "running" for task in overview.tasks), overview.eta_seconds
    state = f"{working} tasks at work" + (f", ETA {duration(eta)}" if eta is not None else "")
    if not working:
        state = "stopped: no task is at work; run the stage again to go on"
    yield f"{name:<12}{'done' if overview.is_done else state}"
    share = overview.users_done / max(overview.num_users, 1)
    yield (
        f"            users: {overview.users_done} of {overview.num_users} done ({share:.1%}), {overview.in_flight} in "
        f"flight, {overview.quarantined} quarantined"
    )
    yield "            " + ", ".join(f"{split}: {state}" for split, state in overview.splits.items())
    hits = overview.cache_hits / max(overview.nodes, 1)
    rates = f"{overview.tokens_per_second:.1f} tokens/s, {overview.users_per_second:.2f} users/s; "
    yield (
        f"            {'' if overview.is_done else rates}{overview.nodes} prompts, {overview.cache_hits} from the "
        f"cache ({hits:.1%}), {overview.tokens} tokens"
    )
    for failure in overview.failures[-SHOWN_FAILURES:]:
        user, reason = (in_one_line(failure[name], SHOWN_CHARACTERS) for name in ("user", "reason"))
        yield f"            quarantined: {user}: node {failure['node']}: {reason}"
    if not overview.is_done:
        yield from (f"            {_task(task, now)}" for task in overview.tasks)


def _task(task: TaskProgress, now: float) -> str:
    seen = f"{duration(now - task.time)} ago"
    if task.state == "failed":
        return f"task {task.task}: failed {seen}: {in_one_line(task.error, SHOWN_CHARACTERS)}"
    return (
        f"task {task.task}: {task.users} users, {task.in_flight} in flight, {task.tokens_per_second:.1f} tokens/s, "
        f"seen {seen}"
    )


def _trained(run: RunFolder, now: float) -> Iterator[str]:
    rows = [row for row in read_metrics(run.root) if row.get("stage") == "train"]
    ranks = describe_ranks(run.root / "heartbeats")
    if not rows and not ranks:
        yield "train       not begun"
        return
    latest = run.checkpoints / "latest"
    name = latest.read_text().strip() if latest.is_file() else ""
    finished = _finished(run.checkpoints / name, run, now) if name else ""
    if finished:
        yield f"train       done: {finished}"
        rows = [row for row in rows if "train/loss" in row] or rows
    elif rows:
        yield f"train       step {rows[-1]['step']}, {duration(now - rows[-1]['time'])} ago"
    else:
        yield "train       no step yet"
    if rows:
        known = MetricRow.__annotations__
        numbers = {name: value for name, value in rows[-1].items() if name not in known and isinstance(value, float)}
        yield "            " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    yield f"            newest checkpoint: {name or 'none'}"
    if not finished:
        yield from (f"          {line}" for line in ranks.splitlines())


def _finished(checkpoint: Path, run: RunFolder, now: float) -> str:
    """How the training ended that wrote this checkpoint last; empty where it goes on or was interrupted."""
    try:
        provenance, state = read_json(checkpoint / PROVENANCE), read_json(checkpoint / "state.json")
    except DataError:  # it is being replaced
        return ""
    step, num_steps = state["step"], provenance.get("train", {}).get("num_steps", 0)
    beats = read_heartbeats(run.root / "heartbeats")
    if any(now - beat["time"] < SILENT_BEATS * BEAT_SECONDS and beat["step"] != step for beat in beats):
        return ""
    if num_steps and step >= num_steps:
        return f"all {num_steps} steps"
    patience = provenance.get("config", {}).get("train", {}).get("early_stopping_patience", 0)
    if patience and state.get("num_bad_evaluations", 0) >= patience:
        return f"stopped early after {step} of {num_steps} steps"
    return ""


def _evaluated(run: RunFolder) -> Iterator[str]:
    folders = {split: run.evaluation / split for split in SPLITS}
    done = [run.evaluation / f"{split}.json" for split in folders if (folders[split] / MANIFEST).is_file()]
    begun = {split: _passes(folders[split]) for split in folders if not (folders[split] / MANIFEST).is_file()}
    states = [f"done: {', '.join(map(str, done))}"] * bool(done)
    states += [f"{split}: parts {', '.join(passes)}" for split, passes in begun.items() if passes]
    yield f"evaluate    {'; '.join(states) or 'not done'}"


def _passes(folder: Path) -> list[str]:
    """How far each pass of an evaluation is."""
    found = []
    for path in sorted(folder.rglob(IDENTITY)):
        scores = ScoreFolder(path.parent)
        recorded: dict[str, Any] = scores.recorded()
        num_parts = len(split_parts(recorded.get("num_users", 0)))
        num_done = sum(1 for _ in path.parent.glob("part-*.jsonl"))
        found.append(f"{num_done} of {num_parts or '?'} of {path.parent.relative_to(folder)}")
    return found


def duration(seconds: float) -> str:
    """``1 d 02:03:04``, without days where there are none."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hours:02d}:{minutes:02d}:{rest:02d}"
