"""The final table: one row a system, one column a metric. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trsr_dist.records import FAMILIES

SYSTEMS = {
    "random": "random",
    "popularity": "popularity",
    "recency": "recency",
    "bm25": "BM25",
    "gru4rec": "GRU4Rec",
    "sasrec": "SASRec",
    "base": "base (before fine-tuning)",
    "model": "fine-tuned",
    "no_summary": "fine-tuned, no summary",
    "no_recent": "fine-tuned, no recent items",
    "control": "control (another user's text)",
}
"""Names of the systems, in the order of the table."""
GAIN = "gain: fine-tuned - control"
PROTOCOL_SYSTEMS = ("random", "popularity", "model", "control")


def column_title(metric: str) -> str:
    """``recall@5`` becomes ``R@5``, ``mrr@5`` ``MRR@5``."""
    return metric.replace("recall", "R").upper()


def format_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    head = [title, *columns]
    lines = [head, *([name, *cells] for name, cells in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    text = []
    for first, *cells in (head, ["-" * width for width in widths], *lines[1:]):
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(text)


def metric_table(results: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """The systems' metrics in the order of ``SYSTEMS``, and below them the personalization gain; of the baselines alone
    where no model was ranked."""
    systems = results["baselines"] | ({"model": results["metrics"]} if "metrics" in results else {})
    rows = [(SYSTEMS[name], [f"{values[metric]:.4f}" for metric in metrics]) for name, values in ordered(systems)]
    gain = results.get("personalization_gain")
    if gain:
        rows.append((GAIN, [f"{gain[metric]['mean']:+.4f}" for metric in metrics]))
    return format_table("system", [column_title(metric) for metric in metrics], rows)


def list_table(entry: Mapping[str, Any], split: str, candidates: str) -> str:
    """The systems on one kind of candidate lists, and how many users and candidates those have."""
    names = [name for name in entry["baselines"]["random"] if name.split("@")[0] in FAMILIES]
    counts = f"{entry['num_users']} {split} users, {entry['num_candidates']} candidates"
    return f"{counts}, negatives: {candidates}\n{metric_table(entry, names)}"


def protocol_rows(results: Mapping[str, Any], metric: str) -> list[dict[str, Any]]:
    """Per candidate protocol, the own one first: systems and personalization gain in one metric."""
    entries = {results["candidates"]: results, **results["protocols"]}
    return [
        {
            "protocol": protocol,
            "systems": {
                SYSTEMS[name]: values[metric]
                for name, values in ordered({**entry["baselines"], "model": entry["metrics"]})
                if name in PROTOCOL_SYSTEMS
            },
            "gain": entry["personalization_gain"].get(metric),
        }
        for protocol, entry in entries.items()
    ]


def protocol_table(results: Mapping[str, Any], metric: str) -> str:
    """The same for the terminal."""
    rows = protocol_rows(results, metric)
    shown = [name for name in ("mean", "low", "high") if name in (rows[0]["gain"] or {})]
    columns = [*rows[0]["systems"], *("gain", "95% low", "95% high")[: len(shown)]]
    cells = []
    for row in rows:
        gain = [f"{row['gain'][name]:+.4f}" for name in shown]
        cells.append((row["protocol"], [*(f"{value:.4f}" for value in row["systems"].values()), *gain]))
    return format_table(f"{column_title(metric)}, negatives", columns, cells)


def ordered(systems: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Systems in the order of ``SYSTEMS``."""
    return [(name, systems[name]) for name in SYSTEMS if name in systems]


def gain_line(gain: Mapping[str, float], metric: str) -> str:
    """Personalization gain in one sentence, with what it means where there is an interval."""
    what = f"personalization gain in {column_title(metric)}: {gain['mean']:+.4f}"
    if "low" not in gain:
        return f"{what} (no interval: evaluate.bootstrap_samples is 0)"
    low, high = gain["low"], gain["high"]
    if low > 0:
        reading = "the score depends on whose text it sees"
    elif high < 0:
        reading = "another user's text scores better: something is wrong"
    else:
        reading = "0 is inside: no sign that the user's own text matters"
    return f"{what} (95% {low:+.4f} to {high:+.4f}): {reading}"
