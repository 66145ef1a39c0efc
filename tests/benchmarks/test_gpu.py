"""The GPU's suite on its tiny shape, and what a failure in the middle of it costs."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_model
from benchmarks.common import Row
from benchmarks.report import check_gpu, run_group, write_results
from trsr_dist.errors import ConfigError, RunError

FINE = Row("gpu", "fine", "rate", 2.0, "x")


def fails() -> list[Row]:
    raise torch.OutOfMemoryError("CUDA out of memory.\nMore words")


def cannot_run() -> list[Row]:
    raise ConfigError("no such package")


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny shape is for machines without a GPU")
def test_every_measurement_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "REPEATS", 1)
    rows = gpu.run(1.0)
    assert gpu.is_complete(rows)
    missing = [row for row in rows if math.isnan(row.value)]
    assert {row.case.split(", ")[-1] for row in missing} == {
        "flash_attn",
        "flash_attn_4",
        "torch",
        "flex",
        "fused kernels",
    }
    assert all(row.note.startswith(("not run: model.attention=", "not run: model.kernels=")) for row in missing)
    measures = {(row.case, row.measure) for row in rows}
    (moved,) = (row for row in rows if row.measure == "log-odds moved by an FP8 base")
    assert 0 < moved.value < 0.5
    for case in ("train 1+1", "train 1+4", "train 1+20", "score 1+20", "train 1+1, recomputed selectively"):
        assert (case, "users a second") in measures
    assert {("compiled layers", f"gain in {name} 1+1") for name in ("training", "scoring")} < measures
    (engine,) = (row for row in rows if row.measure == "engine, 1 in flight")
    assert 0 < engine.value < engine.bound
    assert "a step, 1 in flight" in {row.measure for row in rows}


def test_a_failure_costs_no_other_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [("one", fails), ("two", lambda: [FINE]), ("three", cannot_run)]
    monkeypatch.setattr(gpu, "measurements", lambda setting: parts)
    kept = []
    rows = gpu.run(1.0, keep=lambda rows: kept.append(len(rows)))
    assert kept == [2, 3, 4]
    assert [row.note for row in rows[1:]] == [
        "failed: OutOfMemoryError: CUDA out of memory.",
        "",
        "not run: no such package",
    ]
    assert not gpu.is_complete(rows) and gpu.is_complete(rows[2:])
    late = gpu.run(1.0, until=0.0)
    assert [row.note for row in late[1:]] == ["not run: the time was up"] * 3
    assert not gpu.is_complete(late)


def test_results_are_whole_files_at_any_time(tmp_path: Path) -> None:
    facts = {
        "date": "today",
        "device": "a card",
        "versions": {"torch": "2"},
        "note": "of sand",
        "tests": {"status": 0, "output": "3 ok"},
    }
    write_results(tmp_path, facts, [])
    write_results(tmp_path, facts, [FINE, Row("gpu", "late", "-", math.nan, "", gpu.LATE)])
    found = json.loads((tmp_path / "gpu_results.json").read_text())
    assert [row["value"] for row in found["rows"]] == [2.0, None]
    page = (tmp_path / "gpu_results.md").read_text()
    assert "today, a card" in page and "3 ok" in page and "of sand" in page and gpu.LATE in page


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    inner = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); print('begun'); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        assert run_group([sys.executable, "-c", "raise SystemExit(3)"], stream, 60) == 3
        assert run_group([sys.executable, "-c", outer], stream, 3) is None
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no GPU is visible"):
        check_gpu(tmp_path, 1.0)
    assert not list(tmp_path.iterdir())
