"""Jobs of equal settings share a folder; of different ones the later is kept out."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trsr_dist.errors import RunError
from trsr_dist.locks import CLAIMS, LOCK_STALE_SECONDS, claim
from trsr_dist.processes import host_name, process_start

SETTINGS = {"model": "abc", "top_k": (3, 5)}
OTHER = {"model": "abc", "top_k": (1,)}


def write_entry(folder: Path, digest: str, **changes: Any) -> Path:
    """The claim of another process, one that lives."""
    pid = os.getppid()
    entry = {"host": host_name(), "pid": pid, "started": process_start(pid), "job": "", "restart": 0}
    path = folder / CLAIMS / f"{digest}-{entry['host']}-{pid}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry | {"since": 0, "what": SETTINGS} | changes))
    return path


def test_equal_settings_share_and_others_wait(tmp_path: Path) -> None:
    write_entry(tmp_path, "1" * 12)
    with claim(tmp_path, "1" * 64, SETTINGS):
        pass
    with (
        pytest.raises(RunError, match=rf"pid {os.getppid()} on .* at work here with top_k=\[3, 5\], now \[1\]"),
        claim(tmp_path, "2" * 64, OTHER),
    ):
        pass
    assert len(list((tmp_path / CLAIMS).iterdir())) == 1, "who may not work leaves no claim"


def test_of_two_the_later_goes(tmp_path: Path) -> None:
    with claim(tmp_path, "1" * 64, SETTINGS):
        with pytest.raises(RunError, match="another job"), claim(tmp_path, "2" * 64, OTHER):
            pass
        write_entry(tmp_path, "3" * 12, since=time.time_ns() + 10**9)
        with pytest.raises(RunError, match="another job"), claim(tmp_path, "2" * 64, OTHER):
            pass
    with claim(tmp_path, "2" * 64, OTHER):
        pass


def test_an_entry_that_is_not_written_yet_counts_from_its_first_moment(tmp_path: Path) -> None:
    path = write_entry(tmp_path, "1" * 12)
    path.write_text("")
    with pytest.raises(RunError, match="another job"), claim(tmp_path, "2" * 64, OTHER):
        pass


@pytest.mark.parametrize("content", [b"\xff\x00", b"[1]", b'{"host": 1, "since": "now", "what": [3]}'])
def test_a_claim_that_says_nothing_counts_until_it_is_silent(tmp_path: Path, content: bytes) -> None:
    path = write_entry(tmp_path, "1" * 12)
    path.write_bytes(content)
    with pytest.raises(RunError, match="an unknown process"), claim(tmp_path, "2" * 64, OTHER):
        pass
    os.utime(path, (time.time() - LOCK_STALE_SECONDS - 10,) * 2)
    with claim(tmp_path, "2" * 64, OTHER):
        assert not path.exists()


@pytest.mark.parametrize("end", ["silent", "dead", "earlier start"])
def test_the_dead_claim_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    path = write_entry(tmp_path, "1" * 12, **({"started": "0"} if end == "dead" else {}))
    if end == "silent":
        os.utime(path, (time.time() - LOCK_STALE_SECONDS - 10,) * 2)
    if end == "earlier start":
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        write_entry(tmp_path, "1" * 12, job="7")
    with claim(tmp_path, "2" * 64, OTHER) as entry:
        entry.check_alone()
        assert not path.exists()


def test_what_others_write_is_not_removed(tmp_path: Path) -> None:
    with claim(tmp_path, "1" * 64, SETTINGS) as entry:
        entry.check_alone()
        write_entry(tmp_path, "1" * 12, since=time.time_ns() + 10**9, job="9")
        with pytest.raises(RunError, match=r"Slurm job 9\) is at work here too"):
            entry.check_alone()


RACER = """
import sys
from pathlib import Path
from trsr_dist.errors import RunError
from trsr_dist.locks import claim
print("ready", flush=True)
sys.stdin.readline()
try:
    with claim(Path(sys.argv[1]), sys.argv[2] * 64, {"number": sys.argv[2]}):
        print("held", flush=True)
        sys.stdin.readline()
except RunError:
    print("refused", flush=True)
"""


def test_of_many_that_begin_at_once_no_two_go_on(tmp_path: Path) -> None:
    command, pipes = [sys.executable, "-c", RACER, str(tmp_path)], {"stdin": -1, "stdout": -1, "text": True}
    racers = [subprocess.Popen([*command, str(number)], **pipes) for number in range(6)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 6
    for racer in racers:
        racer.stdin.write("go\n"), racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers]
    assert not any(racer.communicate("end\n", timeout=60)[0] for racer in racers)
    assert [racer.returncode for racer in racers] == [0] * 6
    assert said.count("held") <= 1
    assert said.count("held") + said.count("refused") == 6
