import errno
import fcntl
import os
import secrets
from pathlib import Path
from typing import IO

import pytest

from trsr_dist.errors import DataError, RunError
from trsr_dist.files import (
    atomic_file,
    atomic_folder,
    read_json,
    resumable_file,
    sha256_of,
    temporary_name,
    write_json,
)
from trsr_dist.processes import host_name, process_start
from trsr_dist.run import MANIFEST, check_inputs, is_finished, manifest_hash, write_manifest


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


def test_a_file_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_resumable_file_that_another_process_has_just_finished_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ended between this one's opening and locking."""
    path, flock = tmp_path / "out", fcntl.flock

    def finish_first(stream: IO[bytes], kind: int) -> None:
        os.rename(stream.name, path)
        flock(stream, kind)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(RunError, match="another process"), resumable_file(path, "0" * 64) as (stream, _):
        stream.write("twice\n")
    assert path.read_text() == ""


def test_a_resumable_file_needs_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre has none unless it is mounted with them."""

    def refuse(stream: IO[bytes], kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match="locks no files .*choose another output"), resumable_file(tmp_path / "out", "0"):
        pass


def test_a_link_at_a_temporary_name_is_not_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names cannot be foreseen; and where somebody has guessed one, nothing is written into what the link names."""
    assert temporary_name(tmp_path / "a") != temporary_name(tmp_path / "a")
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    victim = tmp_path / "victim"
    victim.write_text("thesis")
    for path in (tmp_path / "file", tmp_path / "folder"):
        temporary_name(path).symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "file") as stream:
        stream.write("hostile")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "folder"):
        pass
    assert victim.read_text() == "thesis"


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    host, parent = host_name(), os.getppid()
    alive = f"{host}-{parent}-{process_start(parent)}-0a"
    names = {".a.tmp-" + alive, f".b.tmp-{host}-{parent}-1-0a", ".c.tmp-elsewhere-7-7-0a", ".d.tmp-elsewhere-7-7-0a"}
    for name in names:
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / ".d.tmp-elsewhere-7-7-0a", (1, 1))
    os.utime(tmp_path / f".a.tmp-{alive}", (1, 1))
    write_json(tmp_path / "out.json", {})
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out.json", f".a.tmp-{alive}", ".c.tmp-elsewhere-7-7-0a"}


def test_all_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """Some libraries write files for their owner alone."""
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        os.close(os.open(folder / "sub" / "weights", os.O_CREAT, 0o600))
        os.close(os.open(folder / "script", os.O_CREAT, 0o700))
    write_json(tmp_path / "a.json", {})
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode & 0o777
    assert mode & 0o044, "a test under a umask of 077 would show nothing"
    assert (modes["weights"], modes["a.json"], modes["script"]) == (mode, mode, mode | 0o700)
