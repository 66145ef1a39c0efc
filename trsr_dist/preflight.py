"""Checks before a job spends hours: folder, code, packages, disk, GPUs and network of every node, in seconds.

Ranks meet in a folder of the run, which thereby is shown to be shared; the collectives come after that, so that a node
which cannot take part is named instead of hanging the others.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from trsr_dist.environment import Ranks, export_ranks, node_name, slurm_gpus
from trsr_dist.errors import RunError
from trsr_dist.files import read_json, write_json
from trsr_dist.log import get_logger

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "webdataset", "pyarrow", "safetensors", "numpy")
DRIVER = Path("/proc/driver/nvidia")
MUST_AGREE = ("code", "packages", "gpus", "driver")
MEGABYTES, ROUNDS = 16, 3
"""Of the all-reduce that is timed."""

log = get_logger("preflight")


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one rank found on its node."""

    rank: int
    host: str
    """Slurm's name of it."""
    code: str
    """Hash of the package's sources."""
    packages: str
    """Versions of the packages that must agree."""
    gpus: int
    """That the job has there."""
    driver: str
    run_free_gb: float
    scratch_free_gb: float
    port: int = 0
    """Port on which rank 0 listens for the others."""
    faults: list[str] = field(default_factory=list)
    """What is wrong without comparing it with others."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something wrong with a node."""

    host: str
    text: str


@dataclass(frozen=True, slots=True)
class PreflightOptions:
    """What to check against."""

    run: Path
    """The run folder."""
    reports: Path
    """New folder, inside one that exists, in which the ranks of this start meet."""
    scratch: Path
    """Folder on each node's own disk."""
    hosts: list[str]
    """The job's nodes under Slurm's names; rank 0 runs on the first."""
    free_gb: float
    """Space that the run folder and scratch need, in GB."""
    seconds: float
    """Limit of each wait."""


def inspect_node(ranks: Ranks, run: Path, scratch: Path, free_gb: float) -> NodeReport:
    """Look at this node.

    Args:
        ranks: this process.
        run: the run folder.
        scratch: folder on the node's own disk.
        free_gb: space that both need, in GB.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    devices, version, given = DRIVER / "gpus", DRIVER / "version", slurm_gpus()
    gpus = len(list(devices.iterdir())) if devices.is_dir() else 0
    driver = version.read_text().splitlines()[0].strip() if version.is_file() else ""
    free = {"run folder": shutil.disk_usage(run).free / 1e9, "scratch": shutil.disk_usage(scratch).free / 1e9}
    faults = [f"{name}: {found:.1f} GB free, {free_gb:g} needed" for name, found in free.items() if found < free_gb]
    if driver and ranks.local_world_size > gpus:
        faults.append(f"{ranks.local_world_size} tasks for {gpus} GPUs; start one task per GPU")
    return NodeReport(
        rank=ranks.rank,
        host=node_name(),
        code=code_hash(Path(__file__).parent),
        packages=", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        # Of nodes with unequal numbers of GPUs a job may have equal parts; a lost GPU still shows.
        gpus=gpus if given is None else min(gpus, given),
        driver=driver,
        run_free_gb=free["run folder"],
        scratch_free_gb=free["scratch"],
        faults=faults,
    )


def code_hash(folder: Path) -> str:
    """One hash of all Python sources below ``folder``."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def publish(folder: Path, rank: int, value: dict[str, Any]) -> None:
    """Leave this rank's findings where all ranks look."""
    write_json(folder / f"rank-{rank:05d}.json", value)


def collect(folder: Path, world_size: int, seconds: float, form: Any = dict[str, Any]) -> list[Any]:
    """The findings of all ranks, or of those that left some in time, in rank order."""
    end = time.monotonic() + seconds
    while len(paths := sorted(folder.glob("rank-*.json"))) < world_size and time.monotonic() < end:
        time.sleep(0.1)
    return [read_json(path, form) for path in paths]


def wait_for_folder(folder: Path, host: str, seconds: float) -> None:
    """Make ``folder`` inside one that must be there already: a node without the shared disk must not make its own.

    Raises:
        RunError: the outer folder is not seen in time.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            folder.mkdir(exist_ok=True)
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RunError(f"{host}: cannot write in {folder.parent} ({error}); is the disk mounted?") from None
        time.sleep(0.2)


def find_faults(reports: list[NodeReport], world_size: int, hosts: list[str]) -> list[Fault]:
    """Nodes without a report, with a fault, or unlike the majority."""
    silent = sorted(set(hosts) - {report.host for report in reports})
    text = "no report: it does not see the run folder, or its tasks did not start"
    faults = [Fault(host, text) for host in silent]
    if not silent and len(reports) < world_size:
        missing = sorted(set(range(world_size)) - {report.rank for report in reports})
        faults.append(Fault("", f"no report of ranks {missing}: their tasks did not start"))
    faults += [Fault(report.host, text) for report in reports for text in report.faults]
    for name in MUST_AGREE:
        values = [getattr(report, name) for report in reports]
        usual = Counter(values).most_common(1)[0][0] if values else None
        faults += [
            Fault(report.host, f"{name}: {value!r}, elsewhere {usual!r}")
            for report, value in zip(reports, values, strict=True)
            if value != usual
        ]
    return list(dict.fromkeys(faults))


def check_network(ranks: Ranks, options: PreflightOptions, port: int) -> tuple[list[Fault], float]:
    """Let every rank connect to rank 0, then time an all-reduce; faults, and GB/s."""
    folder, host, error = options.reports / "connections", options.hosts[0], ""
    try:
        socket.create_connection((host, port), timeout=options.seconds).close()
    except OSError as problem:
        error = f"cannot reach {host}:{port}: {problem}"
    publish(folder, ranks.rank, {"host": node_name(), "error": error})
    found = collect(folder, ranks.world_size, options.seconds, dict[str, str])
    faults = [Fault(one["host"], one["error"]) for one in found if one["error"]]
    if faults or len(found) < ranks.world_size:
        return faults or [Fault("", "not every rank got as far as the network check")], 0.0
    try:
        return [], all_reduce_bandwidth(ranks, options.seconds)
    except RuntimeError as problem:
        return [Fault(node_name(), f"all-reduce failed: {str(problem).splitlines()[0]}")], 0.0


def all_reduce_bandwidth(ranks: Ranks, seconds: float) -> float:
    """Bus bandwidth of an all-reduce over all ranks, in GB/s: 2 (n - 1) / n times the bytes, as NCCL's tests count.

    Raises:
        RuntimeError: the sum is wrong, or the backend failed or took longer than ``seconds``.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=seconds))
    try:
        values = torch.zeros(MEGABYTES * 2**20 // 4, device=device)
        for _ in range(ROUNDS):
            values.fill_(1)
            start = time.perf_counter()
            dist.all_reduce(values)
            found = values[-1].item()  # waits for the GPU
            taken = time.perf_counter() - start
            if found != ranks.world_size:
                raise RuntimeError(f"an all-reduce of ones over {ranks.world_size} ranks gave {found}")
    finally:
        dist.destroy_process_group()
    return 2 * (ranks.world_size - 1) / ranks.world_size * values.numel() * 4 / taken / 1e9


def check_all(ranks: Ranks, options: PreflightOptions, network: bool) -> tuple[list[Fault], str]:
    """Nodes first, then the network, in which rank 0 listens while the others connect; faults, and what is there."""
    with ExitStack() as stack:
        port, with_network = 0, network and ranks.world_size > 1
        if with_network:
            export_ranks(ranks)
            listener = stack.enter_context(socket.create_server(("", 0), backlog=4096))
            port = listener.getsockname()[1]  # connections to it need not be accepted
        wait_for_folder(options.reports, node_name(), options.seconds)
        report = inspect_node(ranks, options.run, options.scratch, options.free_gb)
        publish(options.reports, ranks.rank, asdict(replace(report, port=port)))
        nodes = collect(options.reports, ranks.world_size, options.seconds, NodeReport)
        faults = find_faults(nodes, ranks.world_size, options.hosts)
        gpus = f"{nodes[0].gpus} GPUs each, {nodes[0].driver}" if nodes and nodes[0].gpus else "no GPUs"
        summary = f"{ranks.world_size} ranks on {len({node.host for node in nodes})} nodes are ready: {gpus}"
        if not with_network:
            return faults, summary
        if faults:
            return faults, ""
        faults, bandwidth = check_network(ranks, options, nodes[0].port)
    return faults, f"{summary}, all-reduce {bandwidth:.2f} GB/s"


def report_faults(ranks: Ranks, faults: list[Fault], path: Path) -> None:
    """One line per fault; the nodes' names go to ``path``, one a line."""
    for fault in faults:
        log.error("preflight: %s: %s", fault.host or "job", fault.text)
    hosts = sorted({fault.host for fault in faults if fault.host})
    if ranks.is_main and hosts:
        path.write_text("\n".join(hosts) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
