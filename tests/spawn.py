"""Run a function as real gloo ranks, or a script, in processes of their own.

They are forked from a server that has imported the libraries: importing takes longer than what most of them do.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT_SECONDS = 240.0
LIBRARIES = ("tests.conftest", "torch", "deepspeed", "trsr_dist.train.job", "trsr_dist.evaluate.job")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: object) -> list[Any]:
    """Call ``function(rank, world_size, *args)`` in every rank of a process group; returns the results by rank.

    The function must stand at the top of a module, and its result must pickle.

    Raises:
        AssertionError: a rank failed or did not answer in time; holds its traceback.
    """
    context = _server()
    environment = os.environ | {"WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
        ranks = [
            context.Process(
                target=_rank_main, args=(sender, Path(folder), function, rank, world_size, args, environment)
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        for rank in ranks:
            rank.start()
        try:
            return [_receive(rank, receiver) for rank, (receiver, _) in enumerate(pipes)]
        finally:
            for rank in ranks:
                rank.join(5)
                if rank.is_alive():
                    rank.kill()
                    rank.join()


class Script:
    """A script of the repository in a separate process; used as a ``subprocess.Popen``.

    Args:
        command: the script and its arguments.
        stdout: file that is appended to.
        stderr: likewise.
        environment: all variables.
    """

    def __init__(self, command: Sequence[str], stdout: Path, stderr: Path, environment: dict[str, str]) -> None:
        self.args = list(command)
        self._process = _server().Process(target=_script_main, args=(self.args, (stdout, stderr), environment))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout_seconds: float = TIMEOUT_SECONDS) -> int:
        """Exit status.

        Raises:
            AssertionError: it still runs after this time.
        """
        self._process.join(timeout_seconds)
        assert self.returncode is not None, f"{self.args} has not ended in {timeout_seconds:.0f} s"
        return self.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


class Scripts:
    """A script as several ranks, each with its variables set as a scheduler does it; nobody watches over them."""

    def __init__(self, command: Sequence[str], output: Path, environment: dict[str, str], num_ranks: int) -> None:
        common = environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        common |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        variables = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
        self._ranks = [Script(command, output, output, own) for own in variables]
        self.pid = self._ranks[0].pid

    def poll(self) -> int | None:
        """None while one runs; else the largest status."""
        codes = [rank.poll() for rank in self._ranks]
        return None if None in codes else max(codes, key=abs)

    @property
    def returncodes(self) -> list[int | None]:
        """By rank."""
        return [rank.returncode for rank in self._ranks]

    def wait(self, timeout_seconds: float = TIMEOUT_SECONDS) -> int:
        """The largest exit status."""
        for rank in self._ranks:
            rank.wait(timeout_seconds)
        return self.poll()

    def kill(self) -> None:
        for rank in self._ranks:
            rank.kill()


def run_script(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """A script with its arguments, to its end, as ``subprocess.run`` with captured text."""
    command = [script, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = Script(command, stdout, stderr, os.environ | {"OMP_NUM_THREADS": "1"} | environment)
        try:
            return subprocess.CompletedProcess(command, process.wait(), stdout.read_text(), stderr.read_text())
        finally:
            process.kill()


def _end_with_tests() -> None:
    """Let this process end when that of the tests does, however that ends: the server lives as long as its ranks."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _script_main(command: list[str], outputs: tuple[Path, Path], environment: dict[str, str]) -> None:
    _end_with_tests()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).resolve().parent))
    runpy.run_path(command[0], run_name="__main__")


def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def _receive(rank: int, receiver: Connection) -> object:
    assert receiver.poll(TIMEOUT_SECONDS), f"rank {rank} gave no answer in {TIMEOUT_SECONDS:.0f} s"
    fine, value = receiver.recv()
    assert fine, f"rank {rank} failed:\n{value}"
    return value


def _rank_main(
    sender: Connection,
    folder: Path,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple,
    environment: dict[str, str],
) -> None:
    _end_with_tests()
    os.environ.clear()  # the server's is that of the first test
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        sender.send((True, function(rank, world_size, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()
