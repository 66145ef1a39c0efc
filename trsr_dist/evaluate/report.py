"""The report: one HTML page with tables, figures, examples, config and provenance; it loads nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from trsr_dist.evaluate.calibration import has_scale
from trsr_dist.evaluate.plots import to_svg
from trsr_dist.evaluate.table import GAIN, SYSTEMS, column_title, gain_line, protocol_rows
from trsr_dist.files import atomic_file


@dataclass(frozen=True, slots=True)
class ReportParts:
    """What a report shows."""

    results: Mapping[str, Any]
    figures: Mapping[str, Figure]
    """By caption."""
    examples: Sequence[Mapping[str, Any]]
    config: str
    metric: str
    """Shown where one metric stands for all."""
    scores: Path
    """Folder of all scores."""
    shards: Path
    """Folder of all texts."""


def write_report(path: Path, parts: ReportParts) -> None:
    """Write the page; every text is escaped."""
    page = Environment(loader=PackageLoader("trsr_dist.evaluate", "."), autoescape=True, trim_blocks=True)
    results = parts.results
    columns = list(results["metrics"])
    gain = results["personalization_gain"].get(parts.metric)
    with atomic_file(path) as stream:
        stream.write(
            page.get_template("report.html").render(
                results=results,
                columns=columns,
                titles={name: column_title(name) for name in columns},
                systems=system_rows(results),
                verdict=gain_line(gain, parts.metric) if gain else "",
                verdict_class="" if gain and gain.get("low", 0) > 0 else "none",
                has_scale=has_scale(results["provenance"].get("train", {}).get("loss")),
                gain_name=GAIN,
                metric=column_title(parts.metric),
                protocols=protocol_rows(results, parts.metric) if results["protocols"] else [],
                slice_columns=[parts.metric, *(name for name in columns if name in ("ndcg@10", "auc"))],
                plots=[{"caption": caption, "svg": to_svg(figure)} for caption, figure in parts.figures.items()],
                examples=parts.examples,
                scores=parts.scores,
                shards=parts.shards,
                provenance=json.dumps(results["provenance"], indent=2, ensure_ascii=False),
                config=parts.config,
            )
        )


def system_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the main table, in its order."""
    metrics = {**results["baselines"], "model": results["metrics"]}
    confidence = {**results["baseline_confidence"], "model": results["confidence"]}
    return [
        {"key": name, "name": title, "metrics": metrics[name], "confidence": confidence[name]}
        for name, title in SYSTEMS.items()
        if name in metrics
    ]
