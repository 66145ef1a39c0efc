"""Worked examples: what the model saw of a user, and how it ranked the candidates. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trsr_dist.records import Sample

NUM_EXAMPLES = 10
SHOWN_ROWS = 20
"""Candidates that are shown, and so many positives below them."""
SHOWN_CHARACTERS = 2000
"""Of one text."""


def build_example(sample: Sample, scores: np.ndarray, control: np.ndarray | None) -> dict[str, Any]:
    """One user: what the model saw, and the first candidates by falling log-odds with all positives, up to a limit.

    Args:
        sample: the user.
        scores: log-odds of the candidates, shape (num_candidates,).
        control: those under another user's text; None where not scored.

    Returns:
        ``rows`` hold a candidate with its rank, or ``left_out``, how many candidates are not shown at this place.
    """
    order = np.argsort(-scores, kind="stable").tolist()
    positives = [rank for rank, place in enumerate(order, 1) if sample.candidates[place].label]
    below = [rank for rank in positives if rank > SHOWN_ROWS][:SHOWN_ROWS]
    shown = [*range(1, min(SHOWN_ROWS, len(order)) + 1), *below]
    rows = {
        rank: {
            "rank": rank,
            "label": sample.candidates[order[rank - 1]].label,
            "text": shorten(sample.candidates[order[rank - 1]].text),
            "score": float(scores[order[rank - 1]]),
            "control": None if control is None else float(control[order[rank - 1]]),
        }
        for rank in shown
    }
    return {
        "user": sample.user,
        "summary": shorten(sample.summary),
        "recent": [shorten(text) for text in sample.recent],
        "rows": list(_with_gaps(shown, rows, len(order))),
        "rank": positives[0],
        "num_candidates": len(order),
    }


def shorten(text: str) -> str:
    """The text, or its head and how much is left out."""
    left_out = len(text) - SHOWN_CHARACTERS
    return text if left_out <= 0 else f"{text[:SHOWN_CHARACTERS]}... ({left_out:,} characters more)"


def _with_gaps(shown: Sequence[int], rows: dict[int, dict[str, Any]], last: int) -> Iterator[dict[str, Any]]:
    for before, rank in zip([0, *shown], [*shown, last + 1], strict=True):
        if rank - before > 1:
            yield {"left_out": rank - before - 1}
        if rank in rows:
            yield rows[rank]
