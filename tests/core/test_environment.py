import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from trsr_dist.environment import (
    VERSION_1,
    VERSION_2,
    Ranks,
    array_task,
    available_memory_bytes,
    cgroup_rests,
    detect_ranks,
    export_ranks,
    node_name,
    ranks_that_fit,
    show_one_gpu,
    slurm_gpus,
    slurm_memory_bytes,
)
from trsr_dist.errors import ConfigError

JOB = "slurm/uid_0/job_7/step_0"
GIB = 2**30


def test_one_process_without_a_launcher() -> None:
    ranks = detect_ranks({})
    assert (ranks.rank, ranks.world_size, ranks.source, ranks.is_main) == (0, 1, "single", True)


def test_torchrun_and_deepspeed_variables() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    ranks = detect_ranks(env)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 8, 1, 4)


def test_deepspeeds_launcher_has_another_name_for_the_ranks_of_a_node() -> None:
    env = {"RANK": "9", "WORLD_SIZE": "32", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}
    assert detect_ranks(env).local_world_size == 8


def test_a_containers_hook_names_sruns_tasks_and_not_how_many_a_node_has() -> None:
    """enroot's 50-slurm-pytorch.sh, in images with PYTORCH_VERSION."""
    env = {"RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "12"}
    env |= {"SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_NODEID": "1"}
    assert detect_ranks(env).local_world_size == 4
    # torchrun, once a node, in a step of two tasks
    env |= {"LOCAL_WORLD_SIZE": "6", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert detect_ranks(env).local_world_size == 6


def test_an_interactive_step_of_one_task_is_one_process() -> None:
    env = {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}
    assert detect_ranks(env).world_size == 1
    assert detect_ranks(env | {"SLURM_STEP_NUM_TASKS": "4"}).world_size == 4


def test_several_nodes_must_know_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    spread = Ranks(5, 8, 1, 4, "n2", job_id="7")
    with pytest.raises(ConfigError, match="8 ranks, 4 of them on n2: set MASTER_ADDR"):
        export_ranks(spread)
    ports = []
    for step in ("0", "1"):
        monkeypatch.setenv("SLURM_STEP_ID", step)
        os.environ.pop("MASTER_PORT", None)
        export_ranks(replace(spread, local_world_size=8))
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[0] != ports[1]
    assert all(20000 <= port < 40000 for port in ports)


@pytest.mark.parametrize(("node", "tasks"), [("0", 2), ("2", 2), ("3", 1)])
def test_srun_variables(node: str, tasks: int) -> None:
    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "4",
        "SLURM_NTASKS": "7",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": node,
        "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
        "SLURM_JOB_ID": "42",
        "SLURM_RESTART_COUNT": "3",
    }
    ranks = detect_ranks(env)
    assert (ranks.rank, ranks.world_size, ranks.local_world_size) == (4, 7, tasks)
    assert (ranks.job_id, ranks.restart, ranks.source) == ("42", 3, "slurm")


def test_a_batch_script_is_not_a_rank() -> None:
    assert detect_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


def test_array_tasks_count_from_zero() -> None:
    assert array_task({}) == (0, 1)
    env = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert array_task(env) == (2, 4)


@pytest.mark.parametrize(
    "env", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}], ids=["not a number", "too high"]
)
def test_bad_ranks_are_named(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="RANK|rank 2 of 2"):
        detect_ranks(env)


@pytest.mark.parametrize(("shown", "expected"), [("4,5,6", "5"), ("7", "7"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_task_is_shown_one_of_the_nodes_gpus(monkeypatch: pytest.MonkeyPatch, shown: str, expected: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    show_one_gpu(local_rank=1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


@pytest.mark.parametrize(("num_gpus", "expected"), [(0, 2), (1, 1), (8, 2)])
def test_a_gpu_gets_one_rank(monkeypatch: pytest.MonkeyPatch, num_gpus: int, expected: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    assert ranks_that_fit(2) == expected


def test_what_slurm_gives_a_job_on_its_node() -> None:
    env = {"SLURMD_NODENAME": "node7", "SLURM_GPUS_ON_NODE": "4", "SLURM_MEM_PER_NODE": "2048"}
    assert (node_name(env), slurm_gpus(env), slurm_memory_bytes(env)) == ("node7", 4, 2**31)
    assert (node_name({}), slurm_gpus({}), slurm_memory_bytes({})) == (socket.gethostname(), None, None)
    assert slurm_memory_bytes({"SLURM_MEM_PER_NODE": "0"}) is None, "the whole node"


@pytest.mark.parametrize(
    ("line", "root", "names", "unlimited"),
    [
        (f"0::/{JOB}", "", VERSION_2, "max"),
        (f"9:cpu,memory:/{JOB}\n4:pids:/elsewhere", "memory", VERSION_1, str(2**63 - 4096)),
    ],
    ids=["version 2", "version 1"],
)
def test_the_tightest_control_group_counts(
    tmp_path: Path, line: str, root: str, names: tuple[str, str, str], unlimited: str
) -> None:
    """Slurm limits the job's group, two levels above the process's own; what files take is given back."""
    group = tmp_path / root / JOB
    group.mkdir(parents=True)
    for folder, limit in ((group, unlimited), (group.parent, str(8 * GIB))):
        for name, text in zip(
            (*names[:2], "memory.stat"), (limit, str(3 * GIB), f"anon 1\n{names[2]} {GIB}"), strict=True
        ):
            (folder / name).write_text(text + "\n")
    assert min(cgroup_rests(tmp_path, line)) == 6 * GIB
    assert cgroup_rests(tmp_path / "container", line) == []


def test_what_slurm_gives_the_job_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert available_memory_bytes() < 0
