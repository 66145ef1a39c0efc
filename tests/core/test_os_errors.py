"""What the system refuses is one clear line that names the file and the way out; faults of the program stay visible."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.data.raw import make_config, write_mind
from trsr_dist.cli import run_command
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import RunError
from trsr_dist.files import explain, writing
from trsr_dist.run import manifest_hash
from trsr_dist.status import describe_run
from trsr_dist.train.checkpoints import CheckpointFolder, TrainerState

NOBODY = 65534
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where another user may look: pytest's own folders are closed to all but their owner."""
    path = Path(tempfile.mkdtemp(prefix="trsr-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def as_a_stranger(action: Callable[[], object]) -> str:
    """What a command prints that runs as a user to whom nothing here belongs; root may read and write everything."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        sys.stdout = sys.stderr = os.fdopen(sender, "w")
        if os.geteuid() == 0:
            os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
        try:
            run_command(lambda: action() and None)
        except SystemExit as end:
            sys.stderr.write(f"[status {end.code}]")
        except BaseException:
            sys.stderr.write(traceback.format_exc())
        sys.stderr.flush()
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as stream:
        output = stream.read()
    os.waitpid(pid, 0)
    return output


def deny(path: Path) -> Path:
    path.chmod(0)
    return path


def prepared(folder: Path, *overrides: str) -> Callable[[], object]:
    write_mind(folder)
    config = make_config(folder, "mind", *overrides)
    return lambda: prepare(config)


def unreadable_config(folder: Path) -> Callable[[], object]:
    prepared(folder)
    path = deny(folder / "config.yaml")
    return lambda: load_config(path)


def closed_folder(folder: Path) -> Callable[[], object]:
    action = prepared(folder)
    deny(folder / "raw_files")
    (folder / "run").mkdir()
    (folder / "run").chmod(0o777)
    return action


def unwritable(folder: Path) -> Callable[[], object]:
    action = prepared(folder)
    (folder / "run").mkdir()
    return action


def unreadable_manifest(folder: Path) -> Callable[[], object]:
    prepared(folder)()
    deny(folder / "run" / "histories" / "manifest.json")
    return lambda: manifest_hash(folder / "run" / "histories")


def unreadable_arrow(folder: Path) -> Callable[[], object]:
    prepared(folder)()
    deny(folder / "run" / "histories" / "items.arrow")
    return lambda: HistoryStore(folder / "run" / "histories")


def closed_run(folder: Path) -> Callable[[], object]:
    prepared(folder)()
    deny(folder / "run" / "histories")
    return lambda: describe_run(folder / "run")


def unreadable_checkpoint(folder: Path) -> Callable[[], object]:
    checkpoints = CheckpointFolder(folder / "checkpoints", 3)
    for step in (1, 2):
        tensors = {f"{kind}/{LAYER}": torch.ones(2, 2) for kind in ("weight", "exp_avg", "exp_avg_sq")}
        checkpoints.save(tensors, TrainerState(step, step, {}), {}, {})
    deny(folder / "checkpoints" / "step-000002" / "optimizer.safetensors")
    return checkpoints.newest


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (prepared, r"FOLDER/run: Permission denied; get permission to write in FOLDER, or choose another run.dir"),
        (unwritable, r"FOLDER/run/.histories.work: Permission denied; get permission to write in FOLDER/run"),
        (unreadable_config, r"FOLDER/config.yaml: Permission denied; get permission to read it"),
        (closed_folder, r"FOLDER/raw_files/\S+: may not be read; ask its owner for permission"),
        (unreadable_manifest, r"FOLDER/run/histories/manifest.json: Permission denied; get permission to read it"),
        (unreadable_arrow, r"FOLDER/run/histories/items.arrow: \D*Permission denied\D*; get permission to read it"),
        (unreadable_checkpoint, r"FOLDER/\S*/optimizer.safetensors: Permission denied; get permission to read it"),
        (closed_run, r"FOLDER/run/histories/manifest.json: Permission denied; get permission to enter"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_files_of_other_users(folder: Path, case: Callable[[Path], Callable[[], object]], message: str) -> None:
    output = as_a_stranger(case(folder))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    assert re.search(f"^error: {message.replace('FOLDER', str(folder))}", output, re.M) and "Traceback" not in output
    assert output.endswith("[status 1]") and "make room" not in output


def make_file(path: Path) -> None:
    path.write_text("thesis")


def make_dangling(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def make_circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("run", make_file, "run is a file where a folder is expected"),
        ("run", make_dangling, "run is a link to .*gone, which is missing"),
        ("run", make_circle, "run is a link to"),
        ("run/histories", make_file, "histories is a file where a folder is expected|histories: a file where"),
        ("run/.histories.lock", Path.mkdir, "histories.lock: Is a directory"),
        ("run/.histories.lock", make_circle, "histories.lock: Too many levels of symbolic links"),
        ("run/.histories.lock", os.mkfifo, "held by an unknown process"),
    ],
)
def test_what_stands_in_the_way_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, make: Callable[[Path], None], message: str
) -> None:
    action, path = prepared(tmp_path), tmp_path / name
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(SystemExit) as end:
        run_command(action)
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith(f"error: {tmp_path}") and re.search(message, error)
    assert make != make_file or path.read_text() == "thesis"


def test_names_that_are_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(prepared(tmp_path, f"run.dir={tmp_path}/{'x' * 300}"))
    assert "File name too long; choose a shorter name" in capsys.readouterr().err


def test_errors_that_no_file_explains_stay_visible() -> None:
    for error in (OSError("no number"), ConnectionResetError(104, "Connection reset by peer"), KeyError("name")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            run_command(fail)
        with pytest.raises(type(error)), writing("folder"):
            fail()
    assert isinstance(explain(OSError(5, "Input/output error"), "disk"), RunError)
