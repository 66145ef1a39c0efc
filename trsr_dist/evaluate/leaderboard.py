"""Many runs in one table: what was trained on what, how it ranks, against whom, and what it cost.

Rows of one table share their candidate lists, so they can be compared; everything is read from run folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from trsr_dist.config import Config, flat_settings, load_config
from trsr_dist.errors import DataError
from trsr_dist.evaluate.table import SYSTEMS, column_title
from trsr_dist.files import atomic_file, read_json, write_json
from trsr_dist.metric_log import read_metrics
from trsr_dist.records import headline

RIVALS = ("bm25", "sasrec")
"""What users would take instead."""
OF_A_RUN = ("model", "no_summary", "no_recent", "control")
"""Systems that are the run's own model; the others may be the same in several runs."""
PAUSE = 10
"""A step that took this many times the median was an interruption."""
NOT_SETTINGS = ("run.dir", "run.tensorboard", "run.trackers", "data.path")
MODEL = "model.name_or_path"


@dataclass(frozen=True, slots=True)
class Entry:
    """One evaluated run."""

    run: str
    data: str
    split: str
    candidates: str
    candidate_hash: str
    num_users: int
    metric: str
    """That of the intervals and differences."""
    date: str
    """Of the evaluation, ISO 8601."""
    settings: dict[str, Any]
    """Those that differ from the shared config's."""
    systems: dict[str, dict[str, float]]
    """Metrics by system; ``model`` is the fine-tuned one."""
    intervals: dict[str, list[float]]
    """95% by system."""
    gain: dict[str, float]
    """Over the control: mean, low, high, p_value."""
    against: dict[str, dict[str, float]]
    """Minus a rival, paired: as ``gain``."""
    tokens_per_user: float
    """Read in training, the prefix counted once."""
    train_hours: float
    """From the first logged step to the last, interruptions left out."""
    num_steps: int


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """The JSON file of a table."""

    runs: list[Entry]


def read_entries(source: Path, shared: Config, split: str) -> list[Entry]:
    """The results of a run, on its own candidate lists and on those of further protocols; or an earlier table's.

    Args:
        source: folder of the run, or the ``.json`` of a table, whose rows stay as they were.
        shared: the config that the runs' settings are compared with.
        split: whose results.

    Raises:
        DataError: the run has no results, or the file is not a table's.
        ConfigError: the config it was evaluated with is gone or unreadable.
    """
    if source.suffix == ".json":
        return read_json(source, Leaderboard).runs
    path = source / "evaluation" / f"{split}.json"
    if not path.is_file():
        raise DataError(f"{path}: not there; run tools/evaluate.py on this run first")
    results, rows = read_json(path), list(read_metrics(source))
    config = load_config(source / "config" / "evaluate.yaml")
    changed = changed_settings(config, shared)
    lists = {results["candidates"]: results, **results["protocols"]}
    return [_entry(source.name, split, name, found, config, changed, rows) for name, found in lists.items()]


def _entry(
    run: str, split: str, candidates: str, found: Any, config: Config, changed: dict[str, Any], rows: list[Any]
) -> Entry:
    trained = [row for row in rows if row["stage"] == "train" and "train/tokens_per_second" in row]
    evaluated = [row["time"] for row in rows if row["stage"] == "evaluate"]
    metric = headline(config.evaluate.top_k)
    differences = {rival: values[metric] for rival, values in found["differences"].items()}
    intervals = {**found["baseline_confidence"], "model": found["confidence"]}
    users, tokens = (sum(row[f"train/{name}_per_second"] for row in trained) for name in ("users", "tokens"))
    return Entry(
        run=run,
        data=config.data.format,
        split=split,
        candidates=candidates,
        candidate_hash=found["candidate_hash"],
        num_users=found["num_users"],
        metric=metric,
        date=datetime.fromtimestamp(max(evaluated), UTC).date().isoformat() if evaluated else "",
        settings=changed,
        systems={**found["baselines"], "model": found["metrics"]},
        intervals={name: values[metric] for name, values in intervals.items() if metric in values},
        gain=found["personalization_gain"].get(metric, {}),
        against={rival: differences[rival] for rival in RIVALS if rival in differences},
        tokens_per_user=tokens / users if users else 0.0,
        train_hours=sum(_working_seconds([row["time"] for row in trained])) / 3600,
        num_steps=max((row["step"] for row in trained), default=0),
    )


def _working_seconds(times: Sequence[float]) -> Iterator[float]:
    """Between logged steps, interruptions left out."""
    gaps = [after - before for before, after in pairwise(times) if after > before]
    usual = median(gaps) if gaps else 0.0
    return (gap for gap in gaps if gap <= PAUSE * usual)


def changed_settings(config: Config, shared: Config) -> dict[str, Any]:
    """Settings as ``section.key`` that differ; of a model its name alone, wherever its folder lies."""
    found, before = _flat(config), _flat(shared)
    return {key: value for key, value in found.items() if before[key] != value and key not in NOT_SETTINGS}


def _flat(config: Config) -> dict[str, Any]:
    found = flat_settings(config)
    return found | {MODEL: Path(found[MODEL]).name.lower()}


def markdown(entries: Sequence[Entry], head: str) -> str:
    """One section a data set and kind of candidate lists."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.data, entry.candidates, entry.candidate_hash), []).append(entry)
    return "\n".join([head, *(line for group in groups.values() for line in _section(group))])


def _section(group: Sequence[Entry]) -> list[str]:
    first = group[0]
    title = f"## {first.data}, negatives: {first.candidates}"
    scope = f"{first.num_users} {first.split} users, candidate lists {first.candidate_hash[:12]}."
    lines = ["", title, "", scope, "", *_systems_table(group), "", "Settings beside the shared config:", ""]
    for entry in group:
        changed = " ".join(
            f"{key}=[{','.join(map(str, value))}]" if isinstance(value, list) else f"{key}={value}"
            for key, value in sorted(entry.settings.items())
        )
        lines.append(f"* `{entry.run}`: {f'`{changed}`' if changed else 'none'}")
    return [*lines, ""]


def _systems_table(group: Sequence[Entry]) -> list[str]:
    """Recall at every cut-off, NDCG at the last; systems that are not a run's own first."""
    recalls = [name for name in group[0].systems["model"] if name.startswith("recall@")]
    shown, name = [*recalls, f"ndcg@{recalls[-1].partition('@')[2]}"], column_title(group[0].metric)
    titles = [*map(column_title, shown), f"{name} 95%", f"control {name}", f"gain in {name} (95%; p)"]
    titles += [f"{name} - {SYSTEMS[rival]} (p)" for rival in RIVALS] + ["tokens a user", "training", "evaluated"]
    lines = [_row(["system", *titles]), _row(["---"] * (len(titles) + 1))]
    for label, cells in _shared_systems(group, shown):
        lines.append(_row([label, *cells, *[""] * (len(titles) - len(cells))]))
    return lines + [_row([entry.run, *_metrics(entry, "model", shown), *_judgement(entry)]) for entry in group]


def _shared_systems(group: Sequence[Entry], shown: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Names and cells of systems that are not a run's own; where runs differ in one, a row for each."""
    for name in (name for name in SYSTEMS if name not in OF_A_RUN):
        rows = {tuple(_metrics(entry, name, shown)): entry.run for entry in reversed(group) if name in entry.systems}
        for cells, run in reversed(rows.items()):
            yield SYSTEMS[name] if len(rows) == 1 else f"{SYSTEMS[name]} ({run})", list(cells)


def _metrics(entry: Entry, system: str, shown: Sequence[str]) -> list[str]:
    values = [f"{entry.systems[system][metric]:.4f}" for metric in shown]
    return [*values, "{:.3f} to {:.3f}".format(*entry.intervals[system]) if system in entry.intervals else ""]


def _judgement(entry: Entry) -> list[str]:
    rivals, control = [entry.against.get(rival) for rival in RIVALS], entry.systems.get("control")
    return [
        f"{control[entry.metric]:.4f}" if control else "",
        "{mean:+.4f} ({low:+.3f} to {high:+.3f}; {p_value:.4f})".format(**entry.gain) if entry.gain else "",
        *("{mean:+.4f} ({p_value:.4f})".format(**found) if found else "" for found in rivals),
        f"{entry.tokens_per_user:.0f}",
        f"{entry.num_steps} steps, {entry.train_hours:.2f} h",
        entry.date,
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_leaderboard(entries: list[Entry], head: str, output: Path) -> None:
    """``output``.md and ``output``.json."""
    write_json(f"{output}.json", asdict(Leaderboard(entries)))
    with atomic_file(f"{output}.md") as stream:
        stream.write(markdown(entries, head))
