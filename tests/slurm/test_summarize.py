"""The summarization as an array and as one job: elements die, are preempted or requeued; the shards stay the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.lab import ENDED, REPOSITORY, Lab, wait_until
from trsr_dist.shards.reader import ShardSet

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]
SETTINGS = [
    "demo.num_users=3000", "demo.num_items=300", "summarize.users_per_shard=50", "summarize.lease_seconds=8",
]  # fmt: skip

FEW = ["demo.num_users=240", "summarize.users_per_shard=10"]


def python(run: Path, program: str, *more: str) -> None:
    """Run a stage without Slurm."""
    settings = ["--config", "configs/quickstart.yaml", *SETTINGS, f"run.dir={run}", *more]
    subprocess.run([sys.executable, program, *settings], cwd=REPOSITORY, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards made by one process."""
    run = tmp_path_factory.mktemp("calm") / "run"
    python(run, "tools/prepare_data.py")
    python(run, "launch/summarize.py")
    return run


@pytest.fixture
def run(lab: Lab, tmp_path: Path) -> Path:
    """A prepared run folder; all nodes are free."""
    python(tmp_path / "run", "tools/prepare_data.py")
    lab.wait_for_nodes(3)
    return tmp_path / "run"


@pytest.fixture
def small_run(lab: Lab, tmp_path: Path) -> Path:
    """A prepared run folder with few users."""
    python(tmp_path / "run", "tools/prepare_data.py", *FEW)
    lab.wait_for_nodes(3)
    return tmp_path / "run"


def submit(lab: Lab, run: Path, options: str) -> str:
    settings = f"configs/quickstart.yaml {' '.join(SETTINGS)} run.dir={run}"
    return lab.run(f"sbatch --parsable -o {run.parent}/%a.out {options} slurm/summarize.sbatch {settings}").strip()


def committed(run: Path) -> int:
    """Tars of users that are safe, published or not."""
    return len(list(run.glob("summaries/work/**/*.tar"))) + len(list(run.glob("shards/*/*.tar")))


def wait_for_work(lab: Lab, run: Path) -> None:
    wait_until(lambda: committed(run) >= 2, 60, "some units are committed", lab.queue)


def assert_same_shards(run: Path, other: Path) -> None:
    for split in ("train", "valid", "test"):
        names = [{path.name for path in folder.glob(f"shards/{split}/*")} for folder in (run, other)]
        assert names[0] == names[1] and names[0]
        for name in names[0]:
            mine, its = ((folder / "shards" / split / name).read_bytes() for folder in (run, other))
            assert mine == its, f"{split}/{name}"


def served(lab: Lab, run: Path, program: Path) -> str:
    """A job whose tasks start their own servers, of the given program."""
    settings = f"configs/quickstart.yaml {' '.join([*SETTINGS, *FEW])} run.dir={run} summarize.model=small"
    env = {"TRSR_VLLM": str(program), "TRSR_VLLM_OPTIONS": "--max-model-len 4096"}
    options = f"--parsable -o {run.parent}/0.out -N2 --ntasks-per-node=2"
    job = lab.run(f"sbatch {options} slurm/summarize_vllm.sbatch {settings}", env=env).strip()
    return lab.wait_for_job(job)


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def text(run: Path) -> str:
    return "\n".join(path.read_text() for path in run.parent.glob("*.out"))


def test_array_with_a_killed_and_a_requeued_element(lab: Lab, run: Path, undisturbed: Path) -> None:
    array = submit(lab, run, "--array=0-2 -n1 --exclusive")
    wait_for_work(lab, run)
    records = {record["ArrayTaskId"]: record for record in lab.jobs(array)}
    victim = "for p in /proc/[0-9]*; do grep -qs [l]aunch/summarize.py $p/cmdline && kill -9 ${p#/proc/}; done; true"
    lab.run(victim, on=records["1"]["BatchHost"])
    lab.run(f"scontrol requeue {array}_2")
    wait_until(lambda: all(one["JobState"] in ENDED for one in lab.jobs(array)), 200, "the array ends", lab.queue)
    assert {one["JobState"] for one in lab.jobs(array)} == {"COMPLETED"}, text(run)
    restarts = {one["ArrayTaskId"]: one["Restarts"] for one in lab.jobs(array)}
    assert restarts["1"] != "0" and restarts["2"] != "0", text(run)
    assert_same_shards(run, undisturbed)


def test_several_tasks_of_one_job_preempted(lab: Lab, run: Path, undisturbed: Path) -> None:
    job = submit(lab, run, "-N2 --ntasks-per-node=2")
    wait_for_work(lab, run)
    urgent = lab.run("sbatch --parsable -p urgent -N3 --exclusive -o /dev/null --wrap 'sleep 1'").strip()
    assert lab.wait_for_job(urgent) == "COMPLETED"
    assert lab.wait_for_job(job) == "COMPLETED", text(run)
    assert lab.job(job)["Restarts"] == "1", text(run)
    assert_same_shards(run, undisturbed)


def test_servers_beside_the_tasks(lab: Lab, small_run: Path, tmp_path: Path) -> None:
    server = REPOSITORY / "tests/summarize/server.py"
    program = script(tmp_path / "vllm", f'echo "$@"; exec {sys.executable} {server} "$@"')
    assert served(lab, small_run, program) == "COMPLETED", text(small_run)
    logs = list(small_run.glob("logs/summarize-*/server-*.log"))
    assert len(logs) == 4
    assert all(path.read_text().startswith("serve small --host 127.0.0.1 --port 2") for path in logs)
    for split in ("train", "valid", "test"):
        shards = ShardSet(small_run / "shards" / split)
        assert all(sample.summary.startswith("summary of") for sample in shards.read_many(range(len(shards))))
    for node in lab.nodes:
        assert str(server) not in lab.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '", on=node, check=False)


def test_a_server_that_does_not_start_ends_the_job(lab: Lab, small_run: Path, tmp_path: Path) -> None:
    program = script(tmp_path / "vllm", "echo no such model; exit 3")
    assert served(lab, small_run, program) == "FAILED", text(small_run)
    assert "the server ended before it answered" in text(small_run) and "no such model" in text(small_run)
    assert not (small_run / "shards").exists()


@pytest.mark.soak
def test_cut_off_element_adds_nothing(lab: Lab, run: Path, undisturbed: Path) -> None:
    """A task behind a broken network goes on writing to the shared disk while others finish its work."""
    array = submit(lab, run, "--array=0-1 -n1 --exclusive")
    wait_for_work(lab, run)
    node = next(one["BatchHost"] for one in lab.jobs(array) if one["JobState"] == "RUNNING")
    lab.unplug(node)
    try:
        wait_until(lambda: (run / "shards/test/manifest.json").exists(), 120, "shards are published", lab.queue)
    finally:
        lab.plug(node)
    wait_until(lambda: all(one["JobState"] in ENDED for one in lab.jobs(array)), 200, "the array ends", lab.queue)
    assert_same_shards(run, undisturbed)
    lab.wait_for_nodes(3, 120)
