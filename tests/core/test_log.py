"""metrics.jsonl over restarts, and in the hands of a process that was cut off."""

import re
import time
from pathlib import Path

import pytest

from trsr_dist import log
from trsr_dist.errors import RunError
from trsr_dist.log import progress, setup_logging
from trsr_dist.metric_log import MetricLog, read_metrics


def write(run: Path, stage: str, steps: range, value: float, **options: object) -> None:
    metrics = MetricLog(run, stage, **options)
    for step in steps:
        metrics.write(step, {f"{stage}/loss": value})
    metrics.close()


def test_a_resumed_stage_takes_out_what_it_makes_again(tmp_path: Path) -> None:
    write(tmp_path, "summarize", range(1, 4), 1.0)
    write(tmp_path, "train", range(1, 8), 2.0)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"stage": "train", "step": 8, "train/lo')
    write(tmp_path, "train", range(6, 9), 3.0, purge_step=6)
    rows = list(read_metrics(tmp_path))
    assert [(row["step"], row["train/loss"]) for row in rows if row["stage"] == "train"] == [
        *((step, 2.0) for step in range(1, 6)),
        *((step, 3.0) for step in range(6, 9)),
    ]
    assert [row["step"] for row in rows if row["stage"] == "summarize"] == [1, 2, 3]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(rows) == 11


def test_a_stage_that_runs_beside_a_resumed_one_loses_no_row(tmp_path: Path) -> None:
    """Such as the summaries of the test users, while a training on those of the train split begins again."""
    write(tmp_path, "train", range(1, 4), 2.0)
    summarize = MetricLog(tmp_path, "summarize")
    summarize.write(1, {"summarize/users": 1.0})
    write(tmp_path, "train", range(3, 5), 3.0, purge_step=3)
    summarize.write(2, {"summarize/users": 2.0})
    summarize.close()
    rows = [(row["stage"], row["step"]) for row in read_metrics(tmp_path)]
    assert sorted(rows) == [("summarize", 1), ("summarize", 2), *(("train", step) for step in range(1, 5))]


def test_a_torn_row_spoils_none_that_follows(tmp_path: Path) -> None:
    """Of a stage that makes nothing again, such as the evaluation, whose only row it would be."""
    (tmp_path / "metrics.jsonl").write_text('{"stage": "summarize", "step": 8, "summ')
    for _ in range(2):
        write(tmp_path, "evaluate", range(3, 4), 1.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [3, 3]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3


def test_a_validation_that_is_made_again_leaves_one_row(tmp_path: Path) -> None:
    metrics = MetricLog(tmp_path, "train")
    for step in (2, 4):
        for name in ("train/loss", "valid/auc"):
            metrics.write(step, {name: 0.5})
    metrics.close()
    for redone, rows in ((None, 4), ("valid/", 3)):
        MetricLog(tmp_path, "train", purge_step=5, redone=redone).close()
        assert len(found := list(read_metrics(tmp_path))) == rows
    assert [row["step"] for row in found if "valid/auc" in row] == [2]


def test_a_process_that_was_cut_off_writes_nothing_more(tmp_path: Path) -> None:
    lost = []

    def fence() -> None:
        if lost:
            raise RunError("lost")

    metrics = MetricLog(tmp_path, "train", fence=fence)
    metrics.write(1, {"train/loss": 0.5})
    lost.append(True)
    with pytest.raises(RunError, match="lost"):
        metrics.write(2, {"train/loss": 0.4})
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_log_that_is_no_terminal_shows_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    setup_logging(stage="prepare")
    with progress(total=4, description="users", unit="user") as bar:
        bar.update(2)
    assert not capsys.readouterr().out, "short work needs no line"
    monkeypatch.setattr(log, "LINE_SECONDS", 0.01)
    with progress(total=4000, description="users", unit="user") as bar:
        time.sleep(0.02)
        bar.update(1000)
        bar.update(1000)
        time.sleep(0.02)
        bar.update(1000)
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[prepare\] users: 1,000 of 4,000, [\d,]+/s, 00:00 left", first)
    assert last.startswith("[prepare] users: 3,000 of 4,000, ")
    setup_logging(rank=1)
    for _ in progress(iter(range(3)), description="items"):
        time.sleep(0.02)
    assert not any(capsys.readouterr()), "one process of a job writes"
