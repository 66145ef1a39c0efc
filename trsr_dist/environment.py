"""The one place that reads and sets environment variables: ranks, threads, traps of the libraries, secrets.

Imports nothing heavy: entry points call ``prepare_process`` before torch is imported.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trsr_dist.errors import ConfigError
from trsr_dist.hashing import hash64

GPU_TRACES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")
"""One of these is there where a GPU can be used; asking torch would be too late."""
KEY_VARIABLE = "OPENAI_API_KEY"

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
"""Limit, use, and the part of the use that the kernel gives back: pages of files that were read."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Who this process is among its peers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    host: str = ""
    restart: int = 0
    """How often Slurm has requeued this job; higher restarts fence lower ones."""
    job_id: str = ""
    source: str = "single"
    """launcher (deepspeed, torchrun), slurm or single."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def detect_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read rank and world size from the launcher's variables, else from srun's, else one process.

    Raises:
        ConfigError: a variable is not a number or is inconsistent with the others.
    """
    env = os.environ if environment is None else environment
    common = {
        "host": socket.gethostname(),
        "restart": _number(env, "SLURM_RESTART_COUNT", 0),
        "job_id": env.get("SLURM_JOB_ID", ""),
    }
    if "RANK" in env and "WORLD_SIZE" in env:
        found = Ranks(
            _number(env, "RANK"),
            _number(env, "WORLD_SIZE"),
            _number(env, "LOCAL_RANK", 0),
            _launched_on_this_node(env),
            source="launcher",
            **common,
        )
    elif (
        {"SLURM_PROCID", "SLURM_STEP_ID"} <= env.keys()
        # An interactive step of one task runs in a job of several.
        and (num_tasks := _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))) > 1
    ):
        found = Ranks(
            _number(env, "SLURM_PROCID"),
            num_tasks,
            _number(env, "SLURM_LOCALID", 0),
            _tasks_on_this_node(env),
            source="slurm",
            **common,
        )
    else:
        found = Ranks(**common)
    if not 0 <= found.rank < found.world_size:
        raise ConfigError(f"rank {found.rank} of {found.world_size} ({found.source}): check RANK and WORLD_SIZE")
    return found


def array_task(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Index and number of tasks of the Slurm array that this process belongs to, (0, 1) outside one."""
    env = os.environ if environment is None else environment
    if "SLURM_ARRAY_TASK_ID" not in env:
        return 0, 1
    first = _number(env, "SLURM_ARRAY_TASK_MIN", 0)
    return _number(env, "SLURM_ARRAY_TASK_ID") - first, _number(env, "SLURM_ARRAY_TASK_COUNT", 1)


def array_share() -> tuple[int, int]:
    """As ``array_task``, for work that is dealt out by these numbers.

    Raises:
        ConfigError: the array has gaps, so that what falls to the missing numbers would be nobody's.
    """
    index, count = array_task()
    first, last = (_number(os.environ, f"SLURM_ARRAY_TASK_{end}", number) for end, number in (("MIN", 0), ("MAX", 0)))
    if count > 1 and last and last - first + 1 != count:
        raise ConfigError(
            f"a Slurm array of {count} tasks from {first} to {last} has gaps, and its tasks share the work out by "
            f"their numbers; submit --array=0-{count - 1}: what is done already is not done again"
        )
    return index, count


def task_number() -> tuple[int, int]:
    """Number of this process among all tasks of a stage that share its work through the run folder, and how many there
    are: the ranks of all tasks of a Slurm array."""
    ranks, (part, num_parts) = detect_ranks(), array_task()
    return part * ranks.world_size + ranks.rank, num_parts * ranks.world_size


def export_ranks(ranks: Ranks) -> None:
    """Set the five variables that torch.distributed and DeepSpeed read, where srun did not.

    Raises:
        ConfigError: the ranks are on several nodes, and nothing says which is the first.
    """
    if ranks.world_size > ranks.local_world_size and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"{ranks.world_size} ranks, {ranks.local_world_size} of them on {ranks.host}: set MASTER_ADDR to the first "
            "node's name before srun, as slurm/common.sh does"
        )
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world_size),
    )
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # Steps of one job may run on one node at the same time.
    own = hash64(ranks.job_id or os.getpid(), os.environ.get("SLURM_STEP_ID", ""))
    os.environ.setdefault("MASTER_PORT", str(20000 + own % 20000))


@contextmanager
def restricted_pickles() -> Iterator[None]:
    """Within this context ``torch.load`` runs no code, even where a library asks for the unrestricted loader."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def prepare_process(num_threads: int | None = None) -> None:
    """Set what the libraries need before they are imported. Call first in an entry point.

    Without the oneDNN limit, bf16 on CPUs whose AMX is advertised but blocked by a hypervisor dies of SIGILL.
    """
    has_gpu = any(Path(path).exists() for path in GPU_TRACES)
    ranks = detect_ranks()
    cores = len(os.sched_getaffinity(0))
    threads = num_threads or max(1, cores // ranks.local_world_size)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DS_LOG_LEVEL": "error",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONWARNINGS": "ignore",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    }
    if not has_gpu:
        defaults["DS_ACCELERATOR"] = "cpu"
        # Threads that spin while they wait slow each other down tenfold where others use the cores too.
        defaults |= {"OMP_WAIT_POLICY": "passive"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # without a GPU it warns wherever PEFT is imported
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def cores_of_a_rank() -> int:
    """Cores that this process may use, shared fairly with the other ranks of the node."""
    return max(1, len(os.sched_getaffinity(0)) // detect_ranks().local_world_size)


def ranks_that_fit(most: int) -> int:
    """Ranks to start on this machine: one a GPU where there are any, and never more than ``most``."""
    import torch

    return min(most, torch.cuda.device_count() or most)


def show_one_gpu(local_rank: int) -> None:
    """Leave this task one of the node's GPUs, for libraries that take the first. Call before CUDA is used.

    Nothing changes where Slurm shows the task its own GPU only.
    """
    import torch

    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = shown.split(",") if shown else [str(number) for number in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local_rank % len(gpus)]


def leave_out_cudnn() -> None:
    """Do without cuDNN's attention, which PyTorch prefers on H100 and later: it plans again for every length, which
    takes longer than the attention, and with a mask its gradients may be NaN (pytorch issue 196678)."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)


def interprets_triton() -> bool:
    """Whether Triton runs its kernels as Python code on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def expand_home(path: str) -> str:
    """A path as a user writes it in a setting; a leading ``~`` or ``~name`` is a home folder, as in a shell.

    Raises:
        ValueError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError(f"no home folder of {expanded.split('/')[0]!r} is known; for a folder of that name write ./~")
    return expanded


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent dies: DeepSpeed's runner leaves its ranks behind as orphans.

    Linux only; elsewhere nothing happens.
    """
    import ctypes

    set_parent_death_signal = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, number)
    except (OSError, AttributeError):
        return


def server_key() -> str:
    """The key of OpenAI-compatible servers; read when needed, kept in no config, log or file. Empty where unset."""
    return os.environ.get(KEY_VARIABLE, "")


def server_address() -> str:
    """Address of the OpenAI-compatible server that runs beside this task; empty where unset."""
    return os.environ.get("OPENAI_BASE_URL", "")


def slurm_end_time() -> float | None:
    """Unix seconds at which Slurm ends this job, None outside Slurm."""
    value = os.environ.get("SLURM_JOB_END_TIME")
    return float(value) if value and value.isdigit() else None


def available_memory_bytes() -> int:
    """The smallest of what the machine, each control group, the Slurm job and the address-space limit have left; all
    there is where the kernel does not say."""
    page = os.sysconf("SC_PAGE_SIZE")
    try:
        meminfo = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        mapped, resident = (int(word) * page for word in Path("/proc/self/statm").read_text().split()[:2])
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * page
    free = [
        int(meminfo.get("MemAvailable", "0").split()[0]) * 1024,
        *cgroup_rests(CGROUP, OWN_GROUPS.read_text() if OWN_GROUPS.is_file() else ""),
    ]
    given = slurm_memory_bytes()
    if given is not None:
        free.append(given - resident)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - mapped)
    return min(free)


def cgroup_rests(mount: Path, own_groups: str) -> list[int]:
    """What is left under the limits of this process's control groups, from the innermost to the outermost.

    Args:
        mount: where the control groups are mounted; version 1 has a folder ``memory`` there.
        own_groups: content of /proc/self/cgroup.
    """
    rests = []
    for line in own_groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (mount / "memory", VERSION_1) if controllers else (mount, VERSION_2)
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                rests += _rest(group, *names)
    return rests


def _rest(group: Path, limit: str, used: str, given_back: str) -> list[int]:
    """Empty where the group has no limit, or is not seen from inside a container."""
    try:
        text = (group / limit).read_text().strip()
        if not text.isdigit():
            return []
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [int(text) - int((group / used).read_text()) + int(stat.get(given_back, 0))]
    except OSError:
        return []


def return_large_blocks() -> None:
    """Have glibc give freed blocks of 1 MB and more back to the kernel at once; nothing happens with another C library.

    torch asks for aligned blocks, and glibc (2.36, for one) cannot use a freed one for the next request of its size: it
    looks for one that is larger by the alignment. So a training keeps two to three times what it needs. The price is
    that the kernel clears the pages again: from 11% of the CPU time of a training to 45%, where the machine is virtual
    and busy. Blocks of less than 1 MB stay with glibc: with a limit of 256 kB a small model takes 60% more time.
    """
    import ctypes

    mmap_threshold = -3
    try:
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**20)
    except (OSError, AttributeError):
        return


def node_name(environment: Mapping[str, str] | None = None) -> str:
    """Slurm's name of this node, which need not be the host's (``node1`` on ``node1.cluster``); else the host's."""
    env = os.environ if environment is None else environment
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def slurm_gpus(environment: Mapping[str, str] | None = None) -> int | None:
    """GPUs of this node that Slurm gives the job, None where it does not say."""
    env = os.environ if environment is None else environment
    return _number(env, "SLURM_GPUS_ON_NODE") if env.get("SLURM_GPUS_ON_NODE") else None


def slurm_memory_bytes(environment: Mapping[str, str] | None = None) -> int | None:
    """Memory of this node that Slurm gives the job, None where it does not say or gives the whole node."""
    env = os.environ if environment is None else environment
    megabytes = _number(env, "SLURM_MEM_PER_NODE", 0)
    return megabytes * 2**20 if megabytes else None


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise ConfigError(f"environment variable {name}={text!r}: expected a whole number")
    return int(text)


def _launched_on_this_node(env: Mapping[str, str]) -> int:
    """DeepSpeed's launcher calls it LOCAL_SIZE; enroot's hook for PyTorch containers, which makes srun's tasks ranks,
    leaves it out."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in env:
            return _number(env, name)
    size = _number(env, "WORLD_SIZE")
    return _tasks_on_this_node(env) if _number(env, "SLURM_STEP_NUM_TASKS", 0) == size else size


def _tasks_on_this_node(env: Mapping[str, str]) -> int:
    """``SLURM_STEP_TASKS_PER_NODE`` is written as ``2(x3),1``: counts with repetitions, in node order."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[min(_number(env, "SLURM_NODEID", 0), len(counts) - 1)]
