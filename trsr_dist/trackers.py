"""Where scalars, figures, settings and final metrics go beside metrics.jsonl: TensorBoard, W&B, MLflow, trackio.

Each tracker works in a thread behind a bounded queue: one that fails, hangs or is not installed costs the stage a line
in the log. Keys and addresses come from the variables that each library reads; nothing here writes them.
"""

from __future__ import annotations

import importlib
import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from typing_extensions import TypedDict

from trsr_dist.config import Config, flat_settings
from trsr_dist.files import read_json, write_json
from trsr_dist.json_text import parse_json
from trsr_dist.log import get_logger
from trsr_dist.metric_log import MetricLog
from trsr_dist.printable import in_one_line, strike_addresses

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROJECT = "trsr_dist"
MAX_CALLS = 10_000
"""Calls that wait for a tracker; one that is further behind is given up."""
CLOSE_SECONDS = 60.0
"""What a tracker may take to send the rest when its stage ends."""
MAX_PARAMS = 100
"""Of one request to MLflow."""

log = get_logger("trackers")


class RunId(TypedDict):
    """What RUN/trackers keeps of a stage's run in a tracker."""

    id: str


@dataclass(frozen=True, slots=True)
class TrackedStage:
    """What a tracker is opened for."""

    root: Path
    """The run folder."""
    name: str
    settings: Mapping[str, Any]
    """By dotted key, without passwords of addresses."""
    purge_step: int | None = None
    """Steps from here on are made again; 1: all of them, as a new run of the tracker."""

    @property
    def title(self) -> str:
        return f"{self.root.resolve().name}/{self.name}"

    @property
    def folder(self) -> Path:
        """What trackers keep of their own."""
        return self.root / "trackers"

    def run_id(self, tracker: str) -> str:
        """Of the earlier start that this one goes on with; empty where it begins a new run."""
        path = self.folder / f"{self.name}-{tracker}.json"
        return "" if self.purge_step == 1 or not path.is_file() else read_json(path, RunId)["id"]

    def keep_run_id(self, tracker: str, value: str) -> None:
        write_json(self.folder / f"{self.name}-{tracker}.json", {"id": value})


class Tracker(Protocol):
    """A stage in one tracker; all calls come from one thread."""

    library: ClassVar[str]
    """Is imported first, in the thread of the stage: two threads that import the same modules may fail."""

    def __init__(self, stage: TrackedStage) -> None: ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def figure(self, name: str, figure: Figure, step: int) -> None: ...

    def close(self, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        """The last call of a stage that ended well, with what losses depend on and the final metrics."""


class TensorBoard:
    """RUN/tensorboard."""

    library = "torch.utils.tensorboard"

    def __init__(self, stage: TrackedStage) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = stage.root / "tensorboard" / stage.name
        self._writer = SummaryWriter(str(folder), purge_step=stage.purge_step, flush_secs=10)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self._writer.add_figure(name, figure, step)

    def close(self, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        if final:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in settings.items()}
            self._writer.add_hparams(plain, {f"final/{k}": v for k, v in final.items()}, run_name="hparams")
        self._writer.close()


class Wandb:
    """W&B; with WANDB_MODE=offline only RUN/trackers/wandb, for ``wandb sync``."""

    library = "wandb"

    def __init__(self, stage: TrackedStage) -> None:
        import wandb

        self._image = wandb.Image
        name = stage.run_id("wandb") or secrets.token_hex(8)
        stage.keep_run_id("wandb", name)
        # No source code, command line or terminal: they may hold what is not meant for others.
        quiet = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True, x_disable_meta=True)
        about = {"name": stage.title, "group": stage.root.resolve().name, "job_type": stage.name}
        stage.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            id=name, resume="allow", dir=str(stage.folder), config=dict(stage.settings), settings=quiet, **about
        )
        self._run.define_metric("*", step_metric="step")  # its own steps never fall, ours do after a kill

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self._run.log({name: self._image(_pixels(figure)), "step": step})

    def close(self, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        self._run.summary.update({f"final/{name}": value for name, value in final.items()})
        self._run.finish()


class Trackio:
    """Trackio: a data base below TRACKIO_DIR, shown by ``trackio show``."""

    library = "trackio"

    def __init__(self, stage: TrackedStage) -> None:
        import trackio

        self._image = trackio.Image
        name = stage.run_id("trackio") or f"{stage.title.replace('/', '-')}-{secrets.token_hex(4)}"
        stage.keep_run_id("trackio", name)
        options = {"group": stage.root.resolve().name, "resume": "allow", "embed": False}
        self._run = trackio.init(PROJECT, name, config=dict(stage.settings), **options)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self._run.log({name: self._image(_pixels(figure))}, step=step)

    def close(self, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        if final:
            self._run.log({f"final/{name}": value for name, value in final.items()})
        self._run.finish()


class MLflow:
    """The server of MLFLOW_TRACKING_URI; without one RUN/trackers/mlruns."""

    library = "mlflow"

    def __init__(self, stage: TrackedStage) -> None:
        import mlflow
        from mlflow.entities import Param

        address = None if mlflow.is_tracking_uri_set() else (stage.folder / "mlruns").resolve().as_uri()
        self._client = mlflow.MlflowClient(address)
        self._run = stage.run_id("mlflow")
        if not self._run:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            self._run = self._client.create_run(experiment, run_name=stage.title).info.run_id
            stage.keep_run_id("mlflow", self._run)
            params = [Param(key, str(value)) for key, value in stage.settings.items()]
            for first in range(0, len(params), MAX_PARAMS):
                self._client.log_batch(self._run, params=params[first : first + MAX_PARAMS])
        self._client.update_run(self._run, status="RUNNING")
        self._client.log_dict(self._run, dict(stage.settings), "config.json")  # parameters cannot be changed
        self._step = 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        self._step, now = step, int(time.time() * 1000)
        metrics = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        self._client.log_figure(self._run, figure, f"figures/{name}-{step}.png")

    def close(self, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        self.scalars({f"final/{name}": value for name, value in final.items()}, self._step)
        self._client.set_terminated(self._run)


def _pixels(figure: Figure) -> np.ndarray:
    """uint8 [height, width, 4]; W&B would take the figure itself, where pyplot is loaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


class Background:
    """A tracker that its stage never waits for, but at the end.

    Args:
        name: for the log.
        kind: of the tracker; opened in the thread, since signing in may hang too.
        stage: what it is opened for.
    """

    def __init__(self, name: str, kind: Callable[[TrackedStage], Tracker], stage: TrackedStage) -> None:
        self._name = name
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(MAX_CALLS)
        self._is_lost = False
        self._thread = threading.Thread(target=self._work, args=(kind, stage), name=f"tracker {name}", daemon=True)
        try:
            importlib.import_module(kind.library)
        except Exception as error:
            self._lose(f"{error} (pip install 'trsr_dist[{name}]')")
        else:
            self._thread.start()

    def put(self, method: str, *arguments: Any) -> None:
        """Have a method of ``Tracker`` called."""
        if not self._is_lost:
            try:
                self._calls.put_nowait((method, arguments))
            except queue.Full:
                self._lose(f"is {MAX_CALLS} calls behind")

    def close(self, settings: Mapping[str, Any], final: Mapping[str, float]) -> None:
        """Let it write what is left, for ``CLOSE_SECONDS`` at most."""
        self.put("close", settings, final)
        if not self._is_lost:
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._lose(f"has not written the rest within {CLOSE_SECONDS:.0f} s")

    def _work(self, kind: Callable[[TrackedStage], Tracker], stage: TrackedStage) -> None:
        try:
            tracker, method = kind(stage), ""
            while method != "close":
                method, arguments = self._calls.get()
                getattr(tracker, method)(*arguments)
        except Exception as error:
            self._lose(f"{type(error).__name__}: {error}")

    def _lose(self, reason: str) -> None:
        if not self._is_lost:
            log.warning(
                "tracker %s: %s; the run goes on without it", self._name, in_one_line(strike_addresses(reason), 300)
            )
            self._is_lost = True  # after the line: whoever closes waits for the thread that writes it


def open_metrics(
    config: Config,
    root: Path,
    stage: str,
    purge_step: int | None = None,
    fence: Callable[[], None] | None = None,
    redone: str | None = None,
) -> MetricLog:
    """The log of a stage's metrics, with the trackers of ``run.trackers``.

    Args:
        config: of the run.
        root: folder that gets metrics.jsonl and what trackers keep.
        stage: its name.
        purge_step: see ``MetricLog``.
        fence: the same.
        redone: the same.
    """
    settings = parse_json(strike_addresses(json.dumps(flat_settings(config))))
    tracked = TrackedStage(root, stage, settings, purge_step)
    names = [name for name in config.run.trackers if name != "tensorboard" or config.run.tensorboard]
    return MetricLog(root, stage, [Background(n, TRACKERS[n], tracked) for n in names], purge_step, fence, redone)
