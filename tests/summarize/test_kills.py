"""Workers die by SIGKILL anywhere and start again in other numbers; the shards are those of one undisturbed worker."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.summarize.world import ROOT, run_job, start, tree_hash, write_config, write_histories
from trsr_dist.shards.reader import ShardSet

pytestmark = pytest.mark.long
SPLITS = ("train", "valid", "test")


def prepared(folder: Path, users: dict[str, int], **settings: object) -> tuple[Path, Path]:
    """Run folder and config of a job that is about to start."""
    run = folder / "run"
    write_histories(run, users)
    return run, write_config(run, summarize={"users_per_shard": 8, "max_new_tokens": 40, **settings})


def undisturbed(folder: Path, users: dict[str, int]) -> dict[str, str]:
    """Shards of one worker."""
    run, config = prepared(folder, users)
    run_job(config)
    return tree_hash(run / "shards")


def assert_every_user_once(run: Path, users: dict[str, int]) -> None:
    for split in SPLITS:
        shards = ShardSet(run / "shards" / split)
        found = [sample.user for sample in shards.read_many(range(len(shards)))]
        assert sorted(found) == sorted(f"{split}-{number}" for number in range(users[split]))


def kill_at_random(config: Path, run: Path, kills: int, seed: int) -> None:
    """Keep up to four workers going, kill one at a random moment, go on with another number, until all is done."""
    draw, workers = random.Random(seed), []
    for _ in range(kills):
        wanted = draw.randint(1, 4)
        workers += [start(config, rank=rank, world_size=wanted) for rank in range(len(workers), wanted)]
        wait_for_journals(run, workers)
        time.sleep(draw.uniform(0, 0.3))
        victim = workers.pop(draw.randrange(len(workers)))
        victim.kill()
        victim.communicate()
        assert victim.returncode == -signal.SIGKILL, "the job was over before the kills: it needs more users"
    workers += [start(config, rank=rank, world_size=2) for rank in range(2)]
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0, output


def wait_for_journals(run: Path, workers: list[subprocess.Popen]) -> None:
    """Until some worker has written more than before: a kill then strikes in the middle of the work."""
    before = journal_bytes(run)
    deadline = time.monotonic() + 60
    while journal_bytes(run) == before:
        assert time.monotonic() < deadline and any(worker.poll() is None for worker in workers)
        time.sleep(0.02)


def journal_bytes(run: Path) -> int:
    return sum(path.stat().st_size for path in run.glob("summaries/journal/*"))


@pytest.mark.parametrize(
    ("kills", "users"),
    [
        (6, {"train": 700, "valid": 20, "test": 20}),
        pytest.param(20, {"train": 6000, "valid": 100, "test": 100}, marks=pytest.mark.soak),
    ],
)
def test_kills_at_random_moments(tmp_path: Path, kills: int, users: dict[str, int]) -> None:
    expected = undisturbed(tmp_path / "calm", users)
    run, config = prepared(tmp_path / "wild", users, lease_seconds=5)
    kill_at_random(config, run, kills, seed=kills)
    assert_every_user_once(run, users)
    assert tree_hash(run / "shards") == expected
    assert not list(run.glob("summaries/work/*"))


def test_a_stopped_worker_wakes_up_when_others_have_done_its_work(tmp_path: Path) -> None:
    users = {"train": 600, "valid": 20, "test": 20}
    expected = undisturbed(tmp_path / "calm", users)
    run, config = prepared(tmp_path / "wild", users, lease_seconds=1)
    sleeper = start(config, rank=0, world_size=2)
    wait_for_journals(run, [sleeper])
    sleeper.send_signal(signal.SIGSTOP)
    try:
        output, _ = (other := start(config, rank=1, world_size=2)).communicate(timeout=120)
        assert other.returncode == 0, output
        assert tree_hash(run / "shards") == expected
    finally:
        sleeper.send_signal(signal.SIGCONT)
    output, _ = sleeper.communicate(timeout=120)
    assert sleeper.returncode == 0, output
    assert tree_hash(run / "shards") == expected
    assert not list(run.glob("summaries/work/*"))


def test_sigterm_gives_the_leases_back_and_asks_to_be_run_again(tmp_path: Path) -> None:
    run, config = prepared(tmp_path, {"train": 900, "valid": 10, "test": 10}, lease_seconds=1000)
    worker = start(config)
    wait_for_journals(run, [worker])
    worker.terminate()
    output, _ = worker.communicate(timeout=60)
    assert worker.returncode == 75, output
    assert list((run / "summaries/leases").iterdir()) == []
    run_job(config)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_at_every_change_of_the_folder(tmp_path: Path, stride: int) -> None:
    """The process ends without a word before its n-th rename, link or removal, for every (fourth) n; then it runs
    again."""
    users = {"train": 9, "valid": 1, "test": 1}
    expected = undisturbed(tmp_path / "calm", users)
    run, config = prepared(tmp_path / "wild", users)
    done = subprocess.run(
        [sys.executable, "-c", _EVERY_STEP, str(config), str(run), str(stride)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) > 80 // stride
    for kept, hashes in outcomes:
        assert hashes == expected
        assert set(kept.items()) <= set(expected.items()), "something half made had the public name"


_EVERY_STEP = """
import json, os, shutil, sys
from pathlib import Path
from tests.summarize.world import tree_hash
from trsr_dist.config import load_config
from trsr_dist.summarize.job import summarize

config, run, stride = load_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has

def child(last):
    '''Run the job, but die before change number ``last``.'''
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    left = [last]
    def counting(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os._exit(9)
            return function(*args, **kwargs)
        return call
    for name in ("rename", "replace", "link", "unlink"):
        setattr(os, name, counting(getattr(os, name)))
    os._exit(summarize(config))

number, status = 1 - stride, 9
while status == 9:
    number += stride
    for folder in ("summaries", "shards", "config"):
        shutil.rmtree(run / folder, ignore_errors=True)
    status = child(number)
    kept = tree_hash(run / "shards")
    assert child(-1) == 0
    print(json.dumps([kept, tree_hash(run / "shards")]))
assert status == 0, status
"""
