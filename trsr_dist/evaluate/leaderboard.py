"""Many runs in one table: what was trained on what, how it ranks, against whom, and what it cost.

Rows of one table share their candidate lists, so they can be compared; everything is read from run folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
from trsr_dist.run import MANIFEST, read_manifest

RIVALS = ("bm25", "sasrec")
"""What users would take instead."""
OF_A_RUN = ("model", "no_summary", "no_recent", "control")
"""Systems that are the run's own model; the others may be the same in several runs."""
PAUSE = 10
"""A step that took this many times the median was an interruption."""
WRITTEN = "Written by `"
"""Begins the line between a page's notes and its tables."""
NOT_SETTINGS = ("run.dir", "run.tensorboard", "run.trackers", "data.path", "evaluate.split")
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
    """Those of training and evaluation that differ from the shared config's."""
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
    """Of the evaluated model."""

    @property
    def table(self) -> tuple[object, ...]:
        """Equal for entries that can be compared: the same lists of the same users, the same metrics."""
        lists = self.data, self.split, self.candidates, self.candidate_hash, self.num_users
        return *lists, *self.systems["model"]


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """The JSON file of a table."""

    runs: list[Entry]


def gather_entries(sources: Sequence[Path], shared: Config, split: str) -> list[Entry]:
    """The entries of all sources, see ``read_entries``; in each table the last one of a run's name.

    Raises:
        DataError: two runs have the same name, or as ``read_entries``.
        ConfigError: as ``read_entries``.
    """
    names = Counter(source.name for source in sources if source.suffix != ".json")
    if doubled := [name for name, count in names.items() if count > 1]:
        raise DataError(f"{doubled[0]}: the name of two runs, whose rows could not be told apart; rename one folder")
    entries = [entry for source in sources for entry in read_entries(source, shared, split)]
    return list({(entry.run, entry.table): entry for entry in entries}.values())


def read_entries(source: Path, shared: Config, split: str) -> list[Entry]:
    """The results of a run, on its own candidate lists and on those of further protocols; or an earlier table's.

    Args:
        source: folder of the run, or the ``.json`` of a table, whose rows stay as they were.
        shared: the config that the runs' settings are compared with.
        split: whose results.

    Raises:
        DataError: the run has no finished results, or the file is not a table's.
        ConfigError: the config it was evaluated with is gone or unreadable.
    """
    if source.suffix == ".json":
        return read_json(source, Leaderboard).runs
    path, folder = source / "evaluation" / f"{split}.json", source / "evaluation" / split
    if not (path.is_file() and (folder / MANIFEST).is_file()):
        raise DataError(f"{path}: not there, or not finished; run tools/evaluate.py on this run first")
    results, evaluate = read_json(path), read_manifest(folder)["settings"]
    config = load_config(source / "config" / "evaluate.yaml")
    # Since then the run may have been trained further, and another split evaluated with other settings.
    sections = config.model_dump(mode="json")
    sections |= results["provenance"].get("config", {}) | {"evaluate": sections["evaluate"] | evaluate}
    common = {
        "run": source.name,
        "data": config.data.format,
        "split": split,
        "metric": headline(evaluate["top_k"]),
        "settings": changed_settings(sections, shared),
        **_costs(list(read_metrics(source)), results, split),
    }
    lists = {results["candidates"]: results, **results["protocols"]}
    return [_entry(name, found, common) for name, found in lists.items()]


def _costs(rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any], split: str) -> dict[str, Any]:
    """What the rows of metrics.jsonl say of the evaluated model's training, if it is this run's, and of its date."""
    step = results["provenance"].get("train", {}).get("step") or 0
    own = step if results.get("trained_on_these_shards") else 0
    trained = [
        row for row in rows if row["stage"] == "train" and row["step"] <= own and "train/users_per_second" in row
    ]
    users, tokens = (sum(row[f"train/{name}_per_second"] for row in trained) for name in ("users", "tokens"))
    evaluated = [row["time"] for row in rows if row["stage"] == "evaluate" and f"{split}/auc" in row]
    return {
        "date": datetime.fromtimestamp(max(evaluated), UTC).date().isoformat() if evaluated else "",
        "tokens_per_user": tokens / users if users else 0.0,
        "train_hours": sum(_working_seconds([row["time"] for row in trained])) / 3600,
        "num_steps": step,
    }


def _entry(candidates: str, found: Mapping[str, Any], common: Mapping[str, Any]) -> Entry:
    metric, differences = common["metric"], found["differences"]
    intervals = {**found["baseline_confidence"], "model": found["confidence"]}
    return Entry(
        **common,
        candidates=candidates,
        candidate_hash=found["candidate_hash"],
        num_users=found["num_users"],
        systems={**found["baselines"], "model": found["metrics"]},
        intervals={name: values[metric] for name, values in intervals.items() if metric in values},
        gain=found["personalization_gain"].get(metric, {}),
        against={rival: differences[rival][metric] for rival in RIVALS if rival in differences},
    )


def _working_seconds(times: Sequence[float]) -> Iterator[float]:
    """Between logged steps, interruptions left out."""
    gaps = [after - before for before, after in pairwise(times) if after > before]
    usual = median(gaps) if gaps else 0.0
    return (gap for gap in gaps if gap <= PAUSE * usual)


def changed_settings(sections: Mapping[str, Mapping[str, Any]], shared: Config) -> dict[str, Any]:
    """Settings as ``section.key`` that differ; of a model its name alone, wherever its folder lies. What the sections
    do not hold, being older than the key, counts as equal."""
    changed = {}
    for key, before in flat_settings(shared).items():
        section, _, name = key.partition(".")
        value = sections[section].get(name, before)
        if key == MODEL:
            value, before = (Path(folder).name.lower() for folder in (value, before))
        if value != before and key not in NOT_SETTINGS:
            changed[key] = value
    return changed


def markdown(entries: Sequence[Entry], head: str) -> str:
    """One section for the entries that can be compared."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.table, []).append(entry)
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
        rows: dict[tuple[str, ...], tuple[str, str]] = {}
        for entry in (entry for entry in group if name in entry.systems):
            *values, interval = _metrics(entry, name, shown)
            rows.setdefault(tuple(values), (entry.run, interval))  # that of other resamples is no other result
        for values, (run, interval) in rows.items():
            yield SYSTEMS[name] if len(rows) == 1 else f"{SYSTEMS[name]} ({run})", [*values, interval]


def _metrics(entry: Entry, system: str, shown: Sequence[str]) -> list[str]:
    values = [f"{entry.systems[system][metric]:.4f}" for metric in shown]
    return [*values, "{:.3f} to {:.3f}".format(*entry.intervals[system]) if system in entry.intervals else ""]


def _judgement(entry: Entry) -> list[str]:
    control = entry.systems.get("control")
    return [
        f"{control[entry.metric]:.4f}" if control else "",
        _difference(entry.gain, " ({low:+.3f} to {high:+.3f}; {p_value:.4f})"),
        *(_difference(entry.against.get(rival, {}), " ({p_value:.4f})") for rival in RIVALS),
        f"{entry.tokens_per_user:.0f}",
        f"{entry.num_steps} steps, {entry.train_hours:.2f} h",
        entry.date,
    ]


def _difference(found: Mapping[str, float], certainty: str) -> str:
    """Without resamples the mean alone."""
    return ("{mean:+.4f}" + certainty * ("p_value" in found)).format(**found) if found else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_leaderboard(entries: list[Entry], command: str, output: Path) -> None:
    """``output``.json and ``output``.md; what the latter says above the line of its command is kept."""
    page = Path(f"{output}.md")
    notes = page.read_text(encoding="utf-8").partition(WRITTEN)[0].strip() if page.is_file() else "# Results"
    write_json(f"{output}.json", asdict(Leaderboard(entries)))
    with atomic_file(page) as stream:
        stream.write(markdown(entries, f"{notes}\n\n{WRITTEN}{command}`."))
