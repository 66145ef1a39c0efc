"""From numbers to what people read: results file, report, TensorBoard, the table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from trsr_dist.config import dump_config
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.figures import build_figures
from trsr_dist.evaluate.reduce import Reduced
from trsr_dist.evaluate.report import ReportParts, write_report
from trsr_dist.evaluate.table import gain_line, metric_table, protocol_table
from trsr_dist.files import sha256_of, write_json
from trsr_dist.log import MetricLog, read_metrics, show
from trsr_dist.records import FAMILIES, headline, metric_names
from trsr_dist.run import MANIFEST, write_manifest


def publish(job: Evaluation, reduced: Reduced) -> None:
    """Write everything; the manifest, which says that all is there, goes first and comes last."""
    (job.folder / MANIFEST).unlink(missing_ok=True)
    results, top_k = reduced.results, job.config.evaluate.top_k
    metric = headline(top_k)
    figures = build_figures(results, reduced.systems, reduced.model, list(read_metrics(job.run.root)), metric)
    config = dump_config(job.config)
    write_json(job.results, results)
    shards = job.run.split(job.split)
    write_report(job.report, ReportParts(results, figures, reduced.examples, config, metric, job.folder, shards))
    write_tensorboard(job, results, figures)
    job.write_config()
    write_manifest(job.folder, "evaluate", job.settings(), job.inputs(), report=sha256_of(job.report))
    show(summary_text(job, results))


def write_tensorboard(job: Evaluation, results: Mapping[str, Any], figures: Mapping[str, Figure]) -> None:
    """Scalars to metrics.jsonl and TensorBoard, figures to TensorBoard, at the training step of the model."""
    step = int(results["provenance"].get("train", {}).get("step") or 0)
    metrics = MetricLog(job.records.root, "evaluate", job.config.run.tensorboard)
    metrics.write(step, scalars(job.split, results))
    if metrics.writer is not None:
        for caption, figure in figures.items():
            metrics.writer.add_figure(f"{job.split}/{caption}", figure, step)
    metrics.close()


def scalars(split: str, results: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, baselines and gains by their names in TensorBoard, those of further protocols too."""
    named = _scalars(split, results)
    for protocol, entry in results["protocols"].items():
        named |= _scalars(f"{split}_{protocol}", entry)
    return named


def _scalars(group: str, results: Mapping[str, Any]) -> dict[str, float]:
    named = {f"{group}/{name}": value for name, value in results["metrics"].items()}
    for system, values in results["baselines"].items():
        named |= {f"{group}_{system}/{metric}": value for metric, value in values.items()}
    return named | {f"{group}_gain/{metric}": gain["mean"] for metric, gain in results["personalization_gain"].items()}


def summary_text(job: Evaluation, results: Mapping[str, Any]) -> str:
    """The final table and where everything lies."""
    top_k = job.config.evaluate.top_k
    names = [name for name in metric_names(top_k) if name.split("@")[0] in FAMILIES]
    metric = headline(top_k)
    lines = [
        "",
        f"{results['num_users']} {job.split} users, {results['num_candidates']} candidates, negatives: "
        f"{results['candidates']}",
        metric_table(results, names, "system"),
    ]
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
