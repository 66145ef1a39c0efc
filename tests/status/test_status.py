"""What tools/status.py reads out of a run folder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.summarize.server import Handler, Server, good, refusing, serving
from tests.summarize.world import ROOT, run_here, start, write_config, write_histories
from trsr_dist.environment import Ranks
from trsr_dist.errors import EngineError, RunError
from trsr_dist.evaluate.score_files import ScoreFolder
from trsr_dist.files import write_json
from trsr_dist.liveness import touching
from trsr_dist.metric_log import MetricLog, read_metrics
from trsr_dist.run import RunFolder
from trsr_dist.status import describe_run, duration
from trsr_dist.summarize.extract import ExtractiveEngine
from trsr_dist.summarize.progress import (
    SILENT_SECONDS,
    ProgressReader,
    Rates,
    TaskProgress,
    read_tasks,
    task_path,
)
from trsr_dist.summarize.requests import Completion
from trsr_dist.train.lifecycle import Heartbeat

USERS = {"train": 30, "valid": 3, "test": 3}


def prepared(folder: Path, server: Server, **settings: object) -> tuple[Path, Path]:
    run = folder / "run"
    write_histories(run, USERS, max_history=12)
    engine = {"engine": "openai", "model": "small", "base_url": server.address, "users_per_shard": 4, "max_retries": 0}
    return run, write_config(run, summarize=engine | settings)


def test_a_job_of_two_tasks_at_work(tmp_path: Path) -> None:
    """The server holds its answers back half way, so that the numbers stand still."""

    def half_way(handler: Handler, body: dict, tries: int) -> None:
        if len(handler.server.requests) > 40:
            handler.server.released.wait(100)
        good(handler, body, tries)

    with serving(half_way) as server:
        server.released = threading.Event()
        run, config = prepared(tmp_path, server, max_in_flight=4)
        tasks = [start(config, rank=rank, world_size=2) for rank in range(2)]
        deadline = time.monotonic() + 60
        while "2 tasks at work" not in (text := describe_run(run)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "prepare     done" in text and "of 36 done" in text and "tokens/s" in text
        assert text.count("task 0000") == 2
        server.released.set()
        assert [task.wait(100) for task in tasks] == [0, 0]
    text = describe_run(run)
    assert "summarize   done" in text and "users: 36 of 36 done (100.0%), 0 in flight, 0 quarantined" in text
    rows = [row for row in read_metrics(run) if row["stage"] == "summarize"]
    assert rows[-1]["summarize/users_done"] == 36 and rows[-1]["summarize/eta_seconds"] == 0
    overview = ProgressReader.latest(RunFolder(run)).read()
    assert overview.tokens == 10 * sum(path == "/v1/chat/completions" for path, _, _ in server.requests)
    assert rows[-1]["summarize/nodes"] == overview.nodes


def test_quarantined_users_and_failed_tasks_are_named(tmp_path: Path) -> None:
    with serving(refusing("title")) as server:
        run, config = prepared(tmp_path, server, failed_users="skip", max_failures=3)
        with pytest.raises(EngineError, match="summarize.max_failures"):
            run_here(config)
        text = describe_run(run)
        assert "stopped: no task is at work" in text
        assert "failed 00:00:0" in text and "summarize.max_failures allows 3" in text
        run_here(config, "summarize.max_failures=100", "summarize.failed_users=recent_only")
    text = describe_run(run)
    assert "36 quarantined" in text and "node 0: BadRequestError 400" in text


def test_an_unforeseen_error_is_told_with_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ExtractiveEngine) -> list[Completion]:
        raise RuntimeError("device-side assert triggered")

    run = tmp_path / "run"
    write_histories(run, USERS)
    monkeypatch.setattr(ExtractiveEngine, "poll", broken)
    with pytest.raises(RuntimeError):
        run_here(write_config(run))
    assert "RuntimeError: device-side assert triggered" in describe_run(run)


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    write_histories(run, USERS)
    run_here(write_config(run), "run.tensorboard=true")
    events = EventAccumulator(str(run / "tensorboard/summarize"))
    events.Reload()
    *_, last = read_metrics(run)
    for name, value in last.items():
        if name.startswith("summarize/"):
            assert events.Scalars(name)[-1].value == pytest.approx(value)
    assert events.Scalars("summarize/users_done")[-1].step == 36


def test_a_task_that_went_silent_does_not_count(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = run / "summaries/progress/abc"
    splits = {"train": {"work": "train-abc", "num_users": 100, "users_per_unit": 10}}
    write_json(folder / "job.json", {"splits": splits})
    for task in (
        TaskProgress("a", "one", uncommitted=5, in_flight=7, users_per_second=2.0, nodes=9, cache_hits=1),
        TaskProgress("b", "two", uncommitted=1, in_flight=1, users_per_second=0.5),
    ):
        write_json(task_path(folder, task.task), asdict(task))
    overview = ProgressReader.latest(RunFolder(run)).read()
    assert (overview.users_done, overview.in_flight, overview.eta_seconds) == (6, 8, 94 / 2.5)
    assert "2 tasks at work, ETA 00:00:38" in describe_run(run)
    for task in "ab":
        os.utime(task_path(folder, task), (time.time() - SILENT_SECONDS - 1,) * 2)
    overview = ProgressReader.latest(RunFolder(run)).read()
    assert (overview.users_done, overview.in_flight, overview.eta_seconds) == (0, 0, None)
    assert (overview.nodes, overview.cache_hits) == (9, 1)


def test_rates_are_those_of_the_last_minutes() -> None:
    now = 0.0
    rates = Rates(lambda: now)
    for now in range(10, 310, 10):  # noqa: B007
        last = rates.update(now * 3, now**2)
    assert last[0] == pytest.approx(3)
    assert last[1] == pytest.approx((300**2 - 180**2) / 120)


def test_a_training_with_its_ranks(tmp_path: Path) -> None:
    metrics = MetricLog(tmp_path, "train")
    metrics.write(10, {"train/loss": 0.7})
    metrics.write(20, {"train/loss": 0.512345, "train/users_per_second": 33.0})
    metrics.close()
    heartbeat = Heartbeat(tmp_path, Ranks(rank=1, world_size=2, host="node1"), hang_seconds=100)
    heartbeat.start()
    heartbeat.at(21, "gradient sum")
    heartbeat.stop()
    text = describe_run(tmp_path)
    assert "step 20, 00:00:0" in text and "train/loss 0.5123, train/users_per_second 33" in text
    assert "rank 1 on node1" in text and "step 21, gradient sum" in text
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text("step-000020")
    assert "newest checkpoint: step-000020" in describe_run(tmp_path)


def finish_training(run: Path, num_steps: int, **state: int) -> None:
    folder = run / "checkpoints" / "step-000020"
    train = {"train": {"step": 20, "num_steps": num_steps}, "config": {"train": {"early_stopping_patience": 2}}}
    write_json(folder / "provenance.json", train)
    write_json(folder / "state.json", {"step": 20, **state})
    (run / "checkpoints" / "latest").write_text("step-000020\n")


def test_a_finished_training_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricLog(tmp_path, "train")
    metrics.write(20, {"train/loss": 0.25})
    metrics.write(20, {"train/save_seconds": 1.0})
    metrics.close()
    heartbeat = Heartbeat(tmp_path, Ranks(), hang_seconds=100)
    heartbeat.start()
    heartbeat.at(20, "saving")
    heartbeat.stop()
    for num_steps, bad, expected in (
        (20, 0, "train       done: all 20 steps"),
        (90, 2, "train       done: stopped early after 20 of 90 steps"),
    ):
        finish_training(tmp_path, num_steps, num_bad_evaluations=bad)
        text = describe_run(tmp_path)
        assert expected in text and "train/loss 0.25\n" in text
        assert "saving" not in text and "newest checkpoint: step-000020" in text
    finish_training(tmp_path, 90, num_bad_evaluations=1)
    assert "train       step 20, " in describe_run(tmp_path) and "saving" in describe_run(tmp_path)
    finish_training(tmp_path, 20)
    heartbeat.at(21, "waiting for data")
    heartbeat._write()
    assert "train       step 20, " in describe_run(tmp_path), "a later start goes on"


def test_an_evaluation_that_is_not_finished(tmp_path: Path) -> None:
    folders = [ScoreFolder(tmp_path / "evaluation" / "test" / name) for name in ("model", "uniform/control")]
    for folder in folders:
        folder.open({"model": "abc"}, 200, "RUN/merged")
    for part in range(3):
        folders[0].write(part, [])
    assert describe_run(tmp_path).endswith("evaluate    test: parts 3 of 4 of model, 0 of 4 of uniform/control")
    write_json(tmp_path / "evaluation" / "valid" / "manifest.json", {})
    text = describe_run(tmp_path)
    assert f"evaluate    done: {tmp_path}/evaluation/valid.json; test: parts 3 of 4 of model" in text
    write_json(tmp_path / "evaluation" / "test" / "manifest.json", {})
    assert text != describe_run(tmp_path) and "parts" not in describe_run(tmp_path)


def test_an_empty_run_and_no_run(tmp_path: Path) -> None:
    text = describe_run(tmp_path)
    assert [line.split()[0] for line in text.splitlines()] == ["prepare", "summarize", "train", "merge", "evaluate"]
    with pytest.raises(RunError, match="no such run folder"):
        describe_run(tmp_path / "nothing")


def test_sampled_summaries_are_seen(tmp_path: Path) -> None:
    sampling = {"samples": 2, "temperature": 1.0, "failed_users": "skip"}
    with serving(refusing("title")) as server:
        run, config = prepared(tmp_path, server, **sampling, max_failures=3)
        with pytest.raises(EngineError, match="summarize.max_failures"):
            run_here(config)
    text = describe_run(run)
    assert "\nsummarize   not begun\nsample 000  stopped: " in text and "max_failures allows 3" in text
    assert "sample 001" not in text
    with serving(good) as server:
        run, config = prepared(tmp_path / "other", server, **sampling)
        run_here(config)
    text = describe_run(run)
    for sample in ("000", "001"):
        assert f"\nsample {sample}  done\n            users: 30 of 30 done (100.0%), 0 in flight, 0 quarant" in text


def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/status.py", str(tmp_path / "nothing")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error:") and "Traceback" not in done.stderr


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 59.6, 3661, 90061)] == [
        "00:00:00",
        "00:01:00",
        "01:01:01",
        "1 d 01:01:01",
    ]


def test_a_task_lives_while_no_user_finishes(tmp_path: Path) -> None:
    path = task_path(tmp_path, "a")
    write_json(path, asdict(TaskProgress("a", "one")))
    os.utime(path, (1, 1))
    assert read_tasks(tmp_path)[0].state == "killed"
    with touching(path, 0.01):
        deadline = time.monotonic() + 20
        while read_tasks(tmp_path)[0].state != "running":
            assert time.monotonic() < deadline
            time.sleep(0.01)
