"""A vLLM server in float32 on loopback, for as long as it is measured or tested."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # has /reset_prefix_cache
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
START_SECONDS = 900.0
END_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Vllm:
    """A server that answers."""

    address: str
    """Such as ``http://127.0.0.1:20001``."""
    process: subprocess.Popen[bytes]
    """Leads the session of all its processes."""

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            if int(fields[3]) == self.process.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def forget(self) -> None:
        """Empty its prefix cache."""
        urlopen(Request(f"{self.address}/reset_prefix_cache", method="POST"), timeout=END_SECONDS).close()


@contextmanager
def vllm_server(program: Path, model: Path, log: Path, *options: str) -> Iterator[Vllm]:
    """Start a server, and end it with the context.

    Args:
        program: vLLM's command.
        model: folder that is served.
        log: file for what the server writes.
        options: further ones of ``vllm serve``.

    Raises:
        RuntimeError: it does not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = [f"{name}={value}" for name, value in VARIABLES.items()]
    command = ["env", *variables, program, "serve", model, "--host", "127.0.0.1", "--port", port, *OPTIONS, *options]
    with open(log, "wb") as stream:
        process = subprocess.Popen(list(map(str, command)), stdout=stream, stderr=stream, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, address, log)
        yield Vllm(address, process)
    finally:
        _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{address}/health", timeout=10) as reply:
                if reply.status == 200:
                    return
        except (URLError, OSError):
            pass
        time.sleep(1)
    raise RuntimeError(f"vLLM did not answer; its log ends with\n{log.read_text(errors='replace')[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started: the group that it leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break
    process.wait(END_SECONDS)
