"""What people read of an evaluation: results file, report, trackers, the table on the terminal.

The report is one HTML page with tables, figures, examples, config and provenance; it loads nothing else.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from trsr_dist.config import dump_config
from trsr_dist.evaluate.advice import recipe, what_to_try
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.figures import build_figures, to_svg, training_values
from trsr_dist.evaluate.reduce import Reduced
from trsr_dist.evaluate.table import GAIN, SYSTEMS, column_title, gain_line, list_table, protocol_rows, protocol_table
from trsr_dist.files import atomic_file, sha256_of, write_json
from trsr_dist.log import show
from trsr_dist.metric_log import read_metrics
from trsr_dist.records import has_scale, headline
from trsr_dist.run import MANIFEST, write_manifest
from trsr_dist.trackers import open_metrics

MAX_SLICES = 20
"""Of one kind; the results file has all."""


def publish(job: Evaluation, reduced: Reduced) -> None:
    """Write everything; the manifest, which says that all is there, goes first and comes last."""
    (job.folder / MANIFEST).unlink(missing_ok=True)
    results, top_k = reduced.results, job.config.evaluate.top_k
    metric = headline(top_k)
    training = list(read_metrics(job.run.root)) if results["trained_on_these_shards"] else []
    figures = build_figures(results, reduced.systems, reduced.model, training, metric)
    train_auc = list(training_values(training, "train/auc").values())
    config = dump_config(job.config)
    write_json(job.results, results)
    shards = job.run.split(job.split)
    write_report(
        job.report, ReportParts(results, figures, reduced.examples, config, metric, job.folder, shards, train_auc)
    )
    write_metrics(job, results, figures)
    job.write_config()
    write_manifest(job.folder, "evaluate", job.settings(), job.inputs(), report=sha256_of(job.report))
    show(summary_text(job, results))


def write_metrics(job: Evaluation, results: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    """Scalars to metrics.jsonl and the trackers, figures to the trackers, at the training step of the model."""
    step = int(results["provenance"].get("train", {}).get("step") or 0)
    metrics = open_metrics(job.config, job.records.root, "evaluate")
    metrics.write(step, scalars(job.split, results))
    for caption, figure in figures.items():
        metrics.write_figure(f"{job.split}/{caption}", figure, step)
    metrics.close()


def scalars(split: str, results: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, baselines and gains by their names in trackers, those of further protocols too."""
    named: dict[str, float] = {}
    entries = {split: results} | {f"{split}_{name}": entry for name, entry in results["protocols"].items()}
    for group, entry in entries.items():
        named |= {f"{group}/{metric}": value for metric, value in entry["metrics"].items()}
        for system, values in entry["baselines"].items():
            named |= {f"{group}_{system}/{metric}": value for metric, value in values.items()}
        named |= {f"{group}_gain/{metric}": gain["mean"] for metric, gain in entry["personalization_gain"].items()}
    return named


def summary_text(job: Evaluation, results: Mapping[str, Any]) -> str:
    """The final table and where everything lies."""
    metric = headline(job.config.evaluate.top_k)
    lines = ["", list_table(results, job.split, results["candidates"])]
    if results["protocols"]:
        lines += ["", protocol_table(results, metric)]
    if results["personalization_gain"]:
        lines.append(gain_line(results["personalization_gain"][metric], metric))
    lines += [
        f"results: {job.results}",
        f"report: {job.report}",
        f"scores: {job.folder}",
        f"TensorBoard: tensorboard --logdir {job.records.root / 'tensorboard'}",
    ]
    return "\n".join(lines)


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
    train_auc: Sequence[float] = ()
    """Of the training's log lines."""


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
                advice=what_to_try(results, parts.train_auc, parts.metric),
                recipe=recipe(results["provenance"]),
                has_scale=has_scale(results["provenance"].get("train", {}).get("loss")),
                gain_name=GAIN,
                metric=column_title(parts.metric),
                protocols=protocol_rows(results, parts.metric) if results["protocols"] else [],
                slices=largest_slices(results["slices"]),
                results_file=f"{results['split']}.json",
                slice_columns=[parts.metric, *(name for name in columns if name in ("ndcg@10", "auc"))],
                plots=[{"caption": caption, "svg": to_svg(figure)} for caption, figure in parts.figures.items()],
                examples=parts.examples,
                scores=parts.scores,
                shards=parts.shards,
                provenance=json.dumps(results["provenance"], indent=2, ensure_ascii=False),
                config=parts.config,
            )
        )


def baselines_text(results: Mapping[str, Any]) -> str:
    """Of the baselines alone: a table for each kind of candidate lists."""
    entries = {results["candidates"]: results, **results["protocols"]}
    return "\n".join(f"\n{list_table(entry, results['split'], name)}" for name, entry in entries.items())


def largest_slices(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The largest of each kind, in the order of the table: among many users hundreds of categories are large enough."""
    places: dict[str, list[int]] = defaultdict(list)
    for place in sorted(range(len(rows)), key=lambda place: -rows[place]["num_users"]):
        places[rows[place]["slice"]].append(place)
    shown = {place for found in places.values() for place in found[:MAX_SLICES]}
    return [row for place, row in enumerate(rows) if place in shown]


def system_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the main table, in its order."""
    metrics = {**results["baselines"], "model": results["metrics"]}
    confidence = {**results["baseline_confidence"], "model": results["confidence"]}
    return [
        {"key": name, "name": title, "metrics": metrics[name], "confidence": confidence[name]}
        for name, title in SYSTEMS.items()
        if name in metrics
    ]
