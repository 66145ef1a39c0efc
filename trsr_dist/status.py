"""The progress of a run, read from its folder: stages, the summarization's tasks, the training's ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from trsr_dist.data.splits import SPLITS
from trsr_dist.errors import RunError
from trsr_dist.log import read_metrics
from trsr_dist.run import MANIFEST, RunFolder
from trsr_dist.summarize.progress import Overview, ProgressReader, TaskProgress
from trsr_dist.train.heartbeat import describe_ranks

SHOWN_FAILURES = 5


def describe_run(root: Path) -> str:
    """The state of a run folder in lines of text.

    Raises:
        RunError: there is no such folder.
    """
    if not root.is_dir():
        raise RunError(f"{root}: no such run folder; give the run.dir of a config")
    run, now = RunFolder(root), time.time()
    parts = [_prepared(run), _summarized(run, now), _trained(run, now), _finished(run)]
    return "\n".join(line for part in parts for line in part)


def _prepared(run: RunFolder) -> Iterator[str]:
    if (run.histories / MANIFEST).is_file():
        yield f"prepare     done: {run.histories}"
    else:
        yield "prepare     not done"


def _summarized(run: RunFolder, now: float) -> Iterator[str]:
    reader = ProgressReader.latest(run)
    if reader is None:
        done = all((run.split(split) / MANIFEST).is_file() for split in SPLITS)
        yield f"summarize   {'done' if done else 'not begun'}"
        return
    overview = reader.read()
    yield f"summarize   {'done' if overview.is_done else _eta(overview)}"
    yield f"            users: {_users(overview)}"
    yield "            " + ", ".join(f"{split}: {state}" for split, state in overview.splits.items())
    yield f"            {_work(overview)}"
    for failure in overview.failures[-SHOWN_FAILURES:]:
        yield f"            quarantined: {failure['user']}: node {failure['node']}: {failure['reason']}"
    if not overview.is_done:
        yield from (f"            {_task(task, now)}" for task in overview.tasks)


def _eta(overview: Overview) -> str:
    working = sum(task.state == "running" for task in overview.tasks)
    if not working:
        return "stopped: no task is at work; run the stage again to go on"
    eta = overview.eta_seconds
    return f"{working} tasks at work" + (f", ETA {duration(eta)}" if eta is not None else "")


def _users(overview: Overview) -> str:
    share = overview.users_done / max(overview.num_users, 1)
    return (
        f"{overview.users_done} of {overview.num_users} done ({share:.1%}), {overview.in_flight} in flight, "
        f"{overview.quarantined} quarantined"
    )


def _work(overview: Overview) -> str:
    hits = overview.cache_hits / max(overview.nodes, 1)
    totals = f"{overview.nodes} prompts, {overview.cache_hits} from the cache ({hits:.1%}), {overview.tokens} tokens"
    if overview.is_done:
        return totals
    return f"{overview.tokens_per_second:.1f} tokens/s, {overview.users_per_second:.2f} users/s; {totals}"


def _task(task: TaskProgress, now: float) -> str:
    seen = f"{duration(now - task.time)} ago"
    if task.state == "failed":
        return f"task {task.task}: failed {seen}: {task.error}"
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
    if rows:
        last = rows[-1]
        yield f"train       step {last['step']}, {duration(now - last['time'])} ago"
        numbers = {name: value for name, value in last.items() if name not in ("stage", "step", "time")}
        yield "            " + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    else:
        yield "train       no step yet"
    latest = run.checkpoints / "latest"
    yield f"            newest checkpoint: {latest.read_text().strip() if latest.is_file() else 'none'}"
    yield from (f"          {line}" for line in ranks.splitlines())


def _finished(run: RunFolder) -> Iterator[str]:
    yield f"merge       {'done: ' + str(run.merged) if (run.merged / 'config.json').is_file() else 'not done'}"
    results = sorted(run.evaluation.glob("*.json"))
    yield f"evaluate    {'done: ' + ', '.join(map(str, results)) if results else 'not done'}"


def duration(seconds: float) -> str:
    """``1 d 02:03:04``, without days where there are none."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d " * bool(days) + f"{hours:02d}:{minutes:02d}:{rest:02d}"
