"""Trackers: what fails or hangs never stops a stage, restarts go on with the same run, no key is in any file."""

import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from trsr_dist import trackers
from trsr_dist.config import Config, load_config
from trsr_dist.metric_log import read_metrics
from trsr_dist.trackers import TRACKERS, TrackedStage, open_metrics

KEY = "0123456789abcdef0123456789abcdef01234567"


class Recorder:
    """Keeps the calls in the class: the object lives in its thread."""

    library = "json"
    calls: list[tuple]

    def __init__(self, stage: TrackedStage) -> None:
        self.calls.append(("open", stage.title, stage.purge_step, stage.settings["train.learning_rate"]))

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((method, *arguments))


class Failing(Recorder):
    def scalars(self, values: dict[str, float], step: int) -> None:
        raise ConnectionError(f"no way to https://me:{KEY}@tracker.example\nfor step {step}")


class Hanging(Recorder):
    release: threading.Event

    def __init__(self, stage: TrackedStage) -> None:
        self.release.wait()


class Missing(Recorder):
    library = "no_such_library"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config("configs/quickstart.yaml", [f"run.dir={tmp_path}/run", "run.trackers=[wandb]"])


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type], None]]:
    """Put a class in the place of a tracker."""

    def replace(kind: type) -> None:
        kind.calls = []
        monkeypatch.setitem(TRACKERS, "wandb", kind)

    Hanging.release = threading.Event()
    yield replace
    Hanging.release.set()


def write(config: Config, steps: range, purge_step: int | None = None, stage: str = "train") -> float:
    """As a stage does; seconds that it took."""
    began = time.monotonic()
    metrics = open_metrics(config, Path(config.run.dir), stage, purge_step)
    for step in steps:
        metrics.write(step, {"train/loss": 1 / step, "test/R@3": 0.5, "train/grad_norm": float("inf")})
    metrics.write_figure("test/Recall by K", Figure(figsize=(1, 1)), steps[-1])
    metrics.close({"loss": "answer"}, {"auc": 0.75})
    return time.monotonic() - began


def test_a_tracker_gets_what_is_written(config: Config, use: Callable) -> None:
    use(Recorder)
    write(config, range(5, 7), purge_step=5)
    figure = Recorder.calls.pop(3)
    assert Recorder.calls == [
        ("open", "run/train", 5, 3e-3),
        *(("scalars", {"train/loss": 1 / step, "test/R@3": 0.5}, step) for step in (5, 6)),
        ("close", {"loss": "answer"}, {"auc": 0.75}),
    ]
    assert figure[:2] == ("figure", "test/Recall by K") and figure[3] == 6


def test_one_that_fails_costs_a_line(config: Config, use: Callable, caplog: pytest.LogCaptureFixture) -> None:
    use(Failing)
    write(config, range(1, 30))
    assert len(caplog.messages) == 1 and KEY not in caplog.messages[0]
    assert caplog.messages[0].startswith(
        "tracker wandb: ConnectionError: no way to https://***@tracker.example for step 1;"
    )
    assert len(list(read_metrics(Path(config.run.dir)))) == 29


@pytest.mark.parametrize(("num_steps", "says"), [(5, "the rest within 0 s"), (200, "is 100 calls behind")])
def test_one_that_hangs_costs_a_line(
    config: Config,
    use: Callable,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    num_steps: int,
    says: str,
) -> None:
    monkeypatch.setattr(trackers, "MAX_CALLS", 100)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    use(Hanging)
    assert write(config, range(1, num_steps)) < 10
    assert len(caplog.messages) == 1 and says in caplog.messages[0]
    assert len(list(read_metrics(Path(config.run.dir)))) == num_steps - 1


def test_one_that_is_not_installed_costs_a_line(
    config: Config, use: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    use(Missing)
    write(config, range(1, 3))
    assert len(caplog.messages) == 1 and "pip install 'trsr_dist[wandb]'" in caplog.messages[0]


def test_a_restart_goes_on_with_the_run_and_a_new_start_does_not(tmp_path: Path) -> None:
    def stage(name: str, purge_step: int | None) -> TrackedStage:
        return TrackedStage(tmp_path, name, {}, purge_step)

    assert stage("train", 4).run_id("mlflow") == ""
    stage("train", 1).keep_run_id("mlflow", "abc")
    assert stage("train", 4).run_id("mlflow") == "abc"
    assert stage("train", 1).run_id("mlflow") == ""
    assert stage("evaluate", None).run_id("mlflow") == stage("train", 4).run_id("wandb") == ""


def test_the_former_switch_still_leaves_tensorboard_out(tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path}", "run.tensorboard=false"]
    write(load_config("configs/quickstart.yaml", settings), range(1, 3))
    assert not (tmp_path / "tensorboard").exists() and (tmp_path / "metrics.jsonl").exists()


def real(name: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A config with this tracker, whose address holds a password; skips where the library is not installed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", KEY)
    monkeypatch.setenv("TRACKIO_DIR", str(Path(config.run.dir) / "trackio"))
    pytest.importorskip(name, reason=f"pip install 'trsr_dist[{name}]'")
    summarize = config.summarize.model_copy(update={"server_url": f"http://me:{KEY}@host/v1"})
    return config.model_copy(
        update={"run": config.run.model_copy(update={"trackers": (name,)}), "summarize": summarize}
    )


def no_key_in(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 1
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_wandb_offline(config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = real("wandb", config, monkeypatch)
    write(config, range(1, 4), purge_step=1)
    write(config, range(3, 6), purge_step=3)
    assert not caplog.messages
    folder = Path(config.run.dir)
    runs = {str(path).rpartition("-")[2] for path in (folder / "trackers/wandb").glob("offline-run-*")}
    records = [record for path in sorted(folder.rglob("*.wandb")) for record in wandb_records(path)]
    history = [record for record in records if record.HasField("history")]
    assert len(runs) == 1
    rows = [
        {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in r.history.item}
        for r in history
    ]
    assert [int(row["step"]) for row in rows if "train/loss" in row] == [1, 2, 3, 3, 4, 5]
    final = [item for r in records if r.HasField("summary") for item in r.summary.update if "final/auc" in str(item)]
    assert final and final[-1].value_json == "0.75"
    no_key_in(folder)


def wandb_records(path: Path) -> Iterator[Any]:
    """Of a transaction log: a header of 7 bytes, then pieces of records in blocks of 32 KB, as LevelDB writes them."""
    from wandb.proto import wandb_internal_pb2

    content, position, data = path.read_bytes(), 7, b""
    while position + 7 < len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
        _, length, kind = struct.unpack_from("<IHB", content, position)
        data += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record
            data = b""


def test_mlflow_file_store(config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = real("mlflow", config, monkeypatch)
    write(config, range(1, 4), purge_step=1)
    write(config, range(3, 6), purge_step=3)
    write(config, range(5, 6), stage="evaluate")
    assert not caplog.messages
    from mlflow import MlflowClient

    client = MlflowClient((Path(config.run.dir) / "trackers" / "mlruns").as_uri())
    found = client.search_runs([client.get_experiment_by_name("trsr_dist").experiment_id])
    runs = {run.info.run_name: run for run in found}
    assert len(found) == 2 and set(runs) == {"run/train", "run/evaluate"}
    train = runs["run/train"]
    history = client.get_metric_history(train.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == [1, 2, 3, 3, 4, 5]
    assert train.data.metrics["final/auc"] == 0.75 and train.data.metrics["test/R_at_3"] == 0.5
    assert train.data.params["train.learning_rate"] == "0.003" and train.info.status == "FINISHED"
    figures = [file.path for file in client.list_artifacts(train.info.run_id, "figures/test")]
    assert figures == ["figures/test/Recall by K-3.png", "figures/test/Recall by K-5.png"]
    no_key_in(Path(config.run.dir))


def test_trackio_local(config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    config = real("trackio", config, monkeypatch)
    write(config, range(1, 4), purge_step=1)
    write(config, range(3, 6), purge_step=3)
    assert not caplog.messages
    import sqlite3

    (path,) = Path(config.run.dir).rglob("*.db")
    rows = list(
        sqlite3.connect(path).execute(
            "select run_name, step from metrics where cast(metrics as text) like '%train/loss%'"
        )
    )
    assert len({name for name, _ in rows}) == 1
    assert [step for _, step in rows] == [1, 2, 3, 3, 4, 5]
    no_key_in(Path(config.run.dir))
