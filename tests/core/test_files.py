import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trsr_dist.errors import DataError, RunError
from trsr_dist.files import (
    atomic_file,
    atomic_folder,
    read_json,
    recover_folder,
    sha256_of,
    temporary_name,
    write_json,
)
from trsr_dist.run import MANIFEST, check_inputs, folder_lock, is_finished, manifest_hash, write_manifest


def test_atomic_file_keeps_the_old_content_on_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_folder_replaces_or_leaves_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    for text in ("one", "two"):
        with atomic_folder(path) as folder:
            (folder / "f").write_text(text)
    assert (path / "f").read_text() == "two"
    with pytest.raises(RuntimeError), atomic_folder(path) as folder:
        (folder / "f").write_text("half")
        raise RuntimeError
    assert (path / "f").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "out", os.rename
    with atomic_folder(path) as folder:
        (folder / "f").write_text("one")

    def fail_once(source: Path, target: Path) -> None:
        if Path(target) == path and ".tmp-" in Path(source).name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output"), atomic_folder(path) as folder:
        (folder / "f").write_text("two")
    assert (path / "f").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_process_killed_between_two_renames_left_is_found_again(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\nfrom pathlib import Path\nfrom trsr_dist import files\n"
        "rename, path = os.rename, Path(sys.argv[1])\n"
        "def die(source, target):\n"
        "    rename(source, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "path.mkdir()\n(path / 'f').write_text('one')\nos.rename = die\n"
        "with files.atomic_folder(path) as folder:\n    (folder / 'f').write_text('two')\n"
    )
    path = tmp_path / "o[u]t"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert not path.exists()
    recover_folder(path)
    assert (path / "f").read_text() == "one"


def test_a_temporary_folder_of_the_same_number_is_no_hindrance(tmp_path: Path) -> None:
    temporary_name(tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "f").write_text("one")
    assert (tmp_path / "out" / "f").read_text() == "one"


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\nfrom trsr_dist.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as f:\n    f.write('half'); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")])
    assert done.returncode == -9
    assert not (tmp_path / "x").exists()


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: missing"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"bad.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
    write_json(tmp_path / "good.json", {"é": 1})
    assert read_json(tmp_path / "good.json") == {"é": 1}
    assert len(sha256_of(tmp_path / "good.json")) == 64


def test_a_finished_stage_is_known_by_settings_and_inputs(tmp_path: Path) -> None:
    folder = tmp_path / "histories"
    assert not is_finished(folder, {"seed": 0}, {})
    folder.mkdir()
    write_manifest(folder, "prepare", {"seed": 0, "split": (10, 1, 1)}, {"raw": "abc"}, num_users=3)
    assert is_finished(folder, {"seed": 0, "split": (10, 1, 1)}, {"raw": "abc"})
    assert not is_finished(folder, {"seed": 1}, {}, force=True)
    with pytest.raises(RunError, match="seed=0, now 1"):
        is_finished(folder, {"seed": 1, "split": (10, 1, 1)}, {"raw": "abc"})
    with pytest.raises(RunError, match="'abc', now 'xyz'"):
        check_inputs(folder, {"raw": "xyz"})
    first = manifest_hash(folder)
    write_manifest(folder, "prepare", {"seed": 0, "split": (10, 1, 1)}, {"raw": "abc"}, num_users=3)
    assert manifest_hash(folder) == first


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(RunError, match=MANIFEST):
        is_finished(tmp_path, {}, {})
    with pytest.raises(RunError, match="no manifest"):
        manifest_hash(tmp_path)


def test_lock_refuses_a_second_holder_and_survives_a_dead_one(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    with folder_lock(folder):
        with pytest.raises(RunError, match=f"held by pid {os.getpid()}"), folder_lock(folder):
            pass
        assert (tmp_path / ".shards.lock").exists()
    assert not (tmp_path / ".shards.lock").exists()
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    holder = {"host": os.uname().nodename, "pid": int(gone.stdout)}
    (tmp_path / ".shards.lock").write_text(json.dumps(holder))
    with folder_lock(folder):
        assert json.loads((tmp_path / ".shards.lock").read_text())["pid"] == os.getpid()


def test_requeued_job_takes_the_lock_over_and_the_earlier_start_learns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "merged"
    code = """
import sys
from pathlib import Path
from trsr_dist.files import atomic_folder
from trsr_dist.run import folder_lock
folder = Path(sys.argv[1])
with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as inside:
    (inside / "text").write_text("old")
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    old = subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes)
    assert old.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="held by"), folder_lock(folder):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with folder_lock(folder) as lock, atomic_folder(folder, lock.check) as inside:
        (inside / "text").write_text("new")
        errors = old.communicate("", timeout=30)[1]
        assert old.returncode == 1 and "lost to" in errors
        lock.check()
    assert (folder / "text").read_text() == "new"


def test_a_disk_that_fails_for_a_moment_loses_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, whole = [OSError(errno.EIO, "Input/output error")] * 2, Path.read_text

    def read(path: Path, **options: object) -> str:
        if failures and path.name == ".shards.lock":
            raise failures.pop()
        return whole(path, **options)

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with folder_lock(tmp_path / "shards") as lock:
        lock.check()
        assert not failures


RACER = """
import os, sys, time
from pathlib import Path
from trsr_dist.errors import RunError
from trsr_dist.run import folder_lock
folder, start = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0.0, start - time.time()))
try:
    with folder_lock(folder):
        os.close(os.open(folder.parent / "inside", os.O_CREAT | os.O_EXCL))
        time.sleep(0.5)
        (folder.parent / "inside").unlink()
        print("held")
except RunError:
    print("refused")
"""


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / ".shards.lock").write_text(json.dumps({"host": os.uname().nodename, "pid": int(gone.stdout)}))
    command = [sys.executable, "-c", RACER, str(tmp_path / "shards"), str(time.time() + 2.0)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = [racer.communicate()[0].strip() for racer in racers]
    assert sorted(said) == ["held"] + ["refused"] * 5
    assert [racer.returncode for racer in racers] == [0] * 6


def test_a_file_replaced_while_it_is_read_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does it, which no test machine has: the first reads find a handle that has gone stale."""
    write_json(tmp_path / "a.json", {"a": 1})
    stale, whole = [OSError(errno.ESTALE, "Stale file handle")] * 2, Path.read_text

    def read(path: Path, **options: object) -> str:
        if stale:
            raise stale.pop()
        return whole(path, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert read_json(tmp_path / "a.json") == {"a": 1}
    stale += [OSError(errno.ESTALE, "Stale file handle")] * 50
    with pytest.raises(DataError, match="missing"):
        read_json(tmp_path / "a.json")
