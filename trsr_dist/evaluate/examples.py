"""Worked examples: what the model saw of a user, and how it ranked the candidates. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from trsr_dist.records import Sample

NUM_EXAMPLES = 10


def build_example(sample: Sample, scores: np.ndarray, control: np.ndarray | None) -> dict[str, Any]:
    """One user: what the model saw, and the candidates by falling log-odds.

    Args:
        sample: the user.
        scores: log-odds of the candidates, shape (num_candidates,).
        control: those under another user's text; None where not scored.
    """
    order = np.argsort(-scores, kind="stable").tolist()
    ranked = [
        {
            "label": sample.candidates[place].label,
            "text": sample.candidates[place].text,
            "score": float(scores[place]),
            "control": None if control is None else float(control[place]),
        }
        for place in order
    ]
    rank = 1 + next(place for place, row in enumerate(ranked) if row["label"])
    return {"user": sample.user, "summary": sample.summary, "recent": sample.recent, "ranked": ranked, "rank": rank}
