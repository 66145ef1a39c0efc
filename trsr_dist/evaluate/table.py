"""The final table: one row a system, one column a metric. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def column_title(metric: str) -> str:
    """``recall@5`` becomes ``R@5``, ``mrr@5`` ``MRR@5``."""
    return metric.replace("recall", "R").upper()


def format_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    head = [title, *columns]
    lines = [head, *([name, *cells] for name, cells in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    ruled = ["-" * width for width in widths]
    return "\n".join(_line(line, widths) for line in (head, ruled, *lines[1:]))


def metric_table(systems: Mapping[str, Mapping[str, float]], metrics: Sequence[str], title: str) -> str:
    """The systems' metrics in the order of ``SYSTEMS``."""
    rows = [
        (SYSTEMS[name], [f"{systems[name][metric]:.4f}" for metric in metrics]) for name in SYSTEMS if name in systems
    ]
    return format_table(title, [column_title(metric) for metric in metrics], rows)


def gain_line(gain: Mapping[str, float], metric: str) -> str:
    """Personalization gain in one sentence, with what it means."""
    low, high = gain["low"], gain["high"]
    if low > 0:
        reading = "the score depends on whose text it sees"
    elif high < 0:
        reading = "another user's text scores better: something is wrong"
    else:
        reading = "0 is inside: no sign that the user's own text matters"
    interval = f"{gain['mean']:+.4f} (95% {low:+.4f} to {high:+.4f})"
    return f"personalization gain in {column_title(metric)}: {interval}: {reading}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = cells[0].ljust(widths[0])
    return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]).rstrip()
