"""Leases: one holder at a time, none for ever, and a holder that wakes up late does no harm."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trsr_dist.leases import LeaseFolder
from trsr_dist.liveness import Owner, Sign, read_sign

LONG, SHORT = 1000.0, 0.4


def folder(path: Path, task: str, seconds: float = LONG, **other: object) -> LeaseFolder:
    """Leases of a task; without more, of this very process."""
    return LeaseFolder(path, replace(Owner.myself(task), **other), seconds)


def asleep(leases: LeaseFolder, name: str) -> LeaseFolder:
    """A holder without a sign of life: as a stopped process, or one whose node hangs."""
    leases.acquire(name)
    leases._beat.stop()
    return leases


def holder(leases: LeaseFolder) -> str:
    return read_sign(leases.folder / "u").owner.task


def age(leases: LeaseFolder, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(leases.folder / name, (then, then))


def test_a_lease_has_one_holder_until_it_is_given_back(tmp_path: Path) -> None:
    one, two = folder(tmp_path, "one"), folder(tmp_path, "two")
    lease = one.acquire("u")
    assert lease is not None and two.acquire("u") is None
    assert holder(one) == "one"
    one.release(lease)
    assert two.acquire("u") is not None and one.acquire("u") is None
    two.close()
    assert one.acquire("u") is not None


def test_nothing_is_left_after_closing(tmp_path: Path) -> None:
    one = folder(tmp_path, "one", host="elsewhere")
    one.acquire("a")
    two = folder(tmp_path, "two")
    two.acquire("a"), two.acquire("b")
    two.close()
    one.close()
    assert list(tmp_path.iterdir()) == []


def test_a_dead_process_of_this_host_loses_its_lease_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom trsr_dist.leases import LeaseFolder\n"
        "from trsr_dist.liveness import Owner\n"
        "LeaseFolder(Path(sys.argv[1]), Owner.myself('dead'), 1000).acquire('u')\nos._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=Path(__file__).parents[2])
    heir = folder(tmp_path, "heir")
    assert holder(heir) == "dead"
    assert heir.acquire("u") is not None


def test_a_silent_holder_on_another_host_loses_its_lease_by_age(tmp_path: Path) -> None:
    asleep(folder(tmp_path, "far", SHORT, host="elsewhere"), "u")
    heir = folder(tmp_path, "heir", SHORT)
    assert heir.acquire("u") is None
    age(heir, "u", 10 * SHORT)
    assert heir.acquire("u") is not None


def test_a_live_holder_keeps_its_lease_beyond_the_term(tmp_path: Path) -> None:
    far, near = folder(tmp_path, "far", SHORT, host="elsewhere"), folder(tmp_path, "near", SHORT)
    lease = far.acquire("u")
    deadline = time.monotonic() + 3 * SHORT
    while time.monotonic() < deadline:
        assert near.acquire("u") is None
        time.sleep(0.05)
    assert far.is_held(lease)


def test_an_earlier_start_of_the_same_job_is_fenced_off(tmp_path: Path) -> None:
    old = folder(tmp_path, "old", host="elsewhere", job="7", restart=0)
    lease = old.acquire("u")
    assert folder(tmp_path, "other", job="8", restart=3).acquire("u") is None
    assert folder(tmp_path, "new", job="7", restart=1).acquire("u") is not None
    assert not old.is_held(lease)


def test_a_holder_that_wakes_up_late_finds_its_lease_lost_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    sleeper = asleep(folder(tmp_path, "sleeper", SHORT, host="elsewhere"), "u")
    lease = sleeper._held["u"]
    age(sleeper, "u", 10 * SHORT)
    heir = folder(tmp_path, "heir", SHORT)
    taken = heir.acquire("u")
    assert taken is not None and not sleeper.is_held(lease) and lease.lost
    sleeper.release(lease)
    sleeper.close()
    assert heir.is_held(taken)


def test_of_two_that_judge_a_lease_stale_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second had judged before the first took over: it must leave the fresh lease alone."""
    dead = asleep(folder(tmp_path, "dead", SHORT, host="elsewhere"), "u")
    age(dead, "u", 10 * SHORT)
    first, second = folder(tmp_path, "first", 1.0), folder(tmp_path, "second", 1.0)
    judge = second.is_dead

    def judge_then_be_overtaken(path: Path, sign: Sign) -> bool:
        monkeypatch.setattr(second, "is_dead", judge)
        stale = judge(path, sign)
        assert stale and first.acquire("u") is not None
        return stale

    monkeypatch.setattr(second, "is_dead", judge_then_be_overtaken)
    assert second.acquire("u") is None
    assert holder(first) == "first"


def test_file_systems_without_hard_links_do_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "link", no_link)
    one, two = folder(tmp_path, "one"), folder(tmp_path, "two")
    lease = one.acquire("u")
    assert one.is_held(lease) and two.acquire("u") is None


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[" * 10_000, b'{"host": "elsewhere", "pid": "seven"}'])
def test_a_lease_that_says_nothing_expires(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "u").write_bytes(content)
    one = folder(tmp_path, "one")
    assert one.acquire("u") is None
    age(one, "u", 2 * LONG)
    assert one.acquire("u") is not None


def test_a_folder_is_no_lease(tmp_path: Path) -> None:
    (tmp_path / "u").mkdir()
    with pytest.raises(IsADirectoryError, match=str(tmp_path / "u")):
        folder(tmp_path, "one").acquire("u")
