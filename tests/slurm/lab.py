"""A real Slurm cluster on one machine: munged, slurmctld and slurmd in namespaces of their own.

Every machine of the lab (``ctl``, ``node1``, ``node2``, ...) has its own host name, address, process table, /dev/shm
and munge daemon; the bridge between them lies inside ctl's network namespace, so nothing appears in the host's network
and no packet leaves it. Killing the first process of a machine is a power cut. The kernel ends every machine when the
process that started the lab dies, however it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "unshare", "nsenter", "ip")
NETWORK = "10.77.0"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL"}
REPOSITORY = Path(__file__).resolve().parents[2]


def what_is_missing() -> str:
    """Why no lab can run here, empty where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if sys.platform != "linux":
        return "the Slurm lab needs Linux namespaces"
    if os.geteuid() != 0:
        return "the Slurm lab needs root"
    if missing:
        return f"the Slurm lab needs {', '.join(missing)} (Debian: slurmctld slurmd slurm-client munge iproute2)"
    return ""


class Lab:
    """Start with ``with Lab(...) as lab``; everything is gone afterwards.

    Args:
        nodes: compute nodes, 1 to 9.
        cpus: CPUs that each node claims to have.
        gpus: fake GPUs of each node, at most 4.
    """

    def __init__(self, nodes: int = 3, cpus: int = 2, gpus: int = 2) -> None:
        self.nodes = [f"node{number + 1}" for number in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="trsr-lab-", dir="/tmp"))  # short: a socket's path has 108 bytes
        self.folder.chmod(0o755)
        self._machines: dict[str, tuple[subprocess.Popen[bytes], int]] = {}
        for name in ("etc", "log", "state", "spool", "sync", "run", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        self._write_settings(cpus, gpus)

    def __enter__(self) -> Lab:
        try:
            for name in ("ctl", *self.nodes):
                self.boot(name)
            self.wait_for_nodes(len(self.nodes))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for name in list(self._machines):
            self.power_off(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self, name: str) -> None:
        """Start a machine and plug it into the network."""
        for file in (self.folder / "sync").glob(f"{name}.*"):
            file.unlink()
        command = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        log = open(self.folder / "log" / f"{name}.log", "ab")  # noqa: SIM115
        outer = subprocess.Popen(
            [*command, "bash", str(Path(__file__).with_name("machine.sh")), str(self.folder), name],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "SLURM_CONF": self._conf},
        )  # fmt: skip
        log.close()
        born = self.folder / "sync" / f"{name}.born"
        wait_until(lambda: born.exists() or outer.poll() is not None, 15, f"{name} did not start: {self.logs()}")
        first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        self._machines[name] = (outer, first)
        self._wire(name, first)
        (self.folder / "sync" / f"{name}.wired").touch()

    def power_off(self, name: str) -> None:
        """Cut a machine's power: all its processes are gone at once."""
        outer, first = self._machines.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        outer.wait(30)  # unshare leaves when its child has

    def unplug(self, node: str) -> None:
        """Cut a node's network; its processes live on."""
        self._in_network("ctl", "ip", "link", "set", f"v{node}", "down")

    def plug(self, node: str) -> None:
        self._in_network("ctl", "ip", "link", "set", f"v{node}", "up")

    def stop_daemon(self, name: str, with_signal: str = "TERM") -> None:
        """End slurmctld or slurmd of a machine, and nothing else there.

        A slurmctld that is killed by KILL forgets what it has not saved yet, which is a fault of another kind.
        """
        run = self.folder / "run"
        self.run(f'touch {run}/daemon.stop; kill -{with_signal} "$(cat {run}/daemon.pid)"', on=name)

    def start_daemon(self, name: str) -> None:
        run = self.folder / "run"
        self.run(f"rm -f {run}/daemon.pid {run}/daemon.stop; sleep 0.01 & true", on=name)
        os.kill(self._machines[name][1], signal.SIGHUP)

    def run(self, script: str, *, on: str = "ctl", env: dict[str, str] | None = None, check: bool = True) -> str:
        """Run a shell script on a machine, in the repository's folder; its output, both streams together.

        Raises:
            AssertionError: it failed (unless ``check`` is off).
        """
        done = subprocess.run(
            ["nsenter", "-t", str(self._machines[on][1]), "-n", "-u", "-i", "-m", "-p", "--",
             "bash", "-c", 'cd "$0" && eval "$1"', str(REPOSITORY), script],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120,
            env=self.environment() | (env or {}),
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{script}: status {done.returncode}\n{done.stdout}"
        return done.stdout

    def environment(self) -> dict[str, str]:
        """What a user's shell on the login node has: this Python first on PATH, one thread, no stray settings."""
        tree = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
        return tree | {
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": os.environ.get("HOME", "/root"),
            "LANG": "C.UTF-8",
            "SLURM_CONF": self._conf,
            "OMP_NUM_THREADS": "1",
            "TRSR_SITE": str(self.folder / "etc" / "site.sh"),
        }

    def wait_for_nodes(self, number: int, seconds: float = 60) -> None:
        """Wait until this number of nodes is up and free."""

        def idle() -> bool:
            lines = self.run("sinfo -h -N -p batch -t idle -o %N", check=False).split()
            return len({line for line in lines if line in self.nodes}) >= number

        wait_until(idle, seconds, f"{number} idle nodes", self.logs)

    def job(self, job: str) -> dict[str, str]:
        """Fields of ``scontrol show job``; of an array, those of its first record."""
        return self.jobs(job)[0]

    def jobs(self, job: str) -> list[dict[str, str]]:
        lines = self.run(f"scontrol show job -o {job}", check=False).splitlines()
        return [dict(f.split("=", 1) for f in line.split() if "=" in f) for line in lines if line.startswith("JobId")]

    def wait_for_job(self, job: str, states: set[str] | str = ENDED, seconds: float = 120) -> str:
        """Wait until a job is in one of the states; that state."""
        wanted = {states} if isinstance(states, str) else states
        wait_until(lambda: self.job(job).get("JobState") in wanted, seconds, f"job {job} in {wanted}", self.queue)
        return self.job(job)["JobState"]

    def queue(self) -> str:
        return self.run("squeue -a; sinfo -N", check=False)

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    @property
    def _conf(self) -> str:
        return str(self.folder / "etc" / "slurm.conf")

    def _write_settings(self, cpus: int, gpus: int) -> None:
        etc = self.folder / "etc"
        addresses = [f"{NETWORK}.1 ctl", *(f"{NETWORK}.{11 + i} {node}" for i, node in enumerate(self.nodes))]
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(addresses) + "\n")
        (etc / "munge.key").write_bytes(secrets.token_bytes(128))
        (etc / "munge.key").chmod(0o600)
        (etc / "site.sh").write_text("source slurm/site.sh\nTRSR_SCRATCH=/tmp TRSR_FREE_GB=0.1\n")
        (etc / "gres.conf").write_text(
            f"NodeName=node[1-{len(self.nodes)}] Name=gpu File={self.folder}/run/dev/gpu[0-{gpus - 1}]\n"
        )
        # Slurm 22.05 always loads a cgroup plugin; its v1 is content with nothing mounted.
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
        old = int(version.split(".")[0]) < 23
        (etc / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n" if old else "CgroupPlugin=disabled\n"
        )
        template = Path(__file__).with_name("slurm.conf.in").read_text()
        for key, value in {
            "LAB": self.folder,
            "NET": NETWORK,
            "NODES": len(self.nodes),
            "CPUS": cpus,
            "GPUS": gpus,
        }.items():
            template = template.replace(f"@{key}@", str(value))
        (etc / "slurm.conf").write_text(template)

    def _wire(self, name: str, first: int) -> None:
        if name == "ctl":
            self._in_network(name, "ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
            self._in_network(name, "ip", "addr", "add", f"{NETWORK}.1/24", "dev", "br0")
            self._in_network(name, "ip", "link", "set", "br0", "up")
            return
        address = f"{NETWORK}.{11 + self.nodes.index(name)}/24"
        self._in_network("ctl", "ip", "link", "del", f"v{name}", check=False)
        pair = ["type", "veth", "peer", "name", "eth0", "netns", str(first)]
        self._in_network("ctl", "ip", "link", "add", f"v{name}", *pair)
        self._in_network("ctl", "ip", "link", "set", f"v{name}", "master", "br0", "up")
        self._in_network(name, "ip", "addr", "add", address, "dev", "eth0")
        self._in_network(name, "ip", "link", "set", "eth0", "up")

    def _in_network(self, name: str, *command: str, check: bool = True) -> None:
        enter = ["nsenter", "-t", str(self._machines[name][1]), "-n"]
        subprocess.run([*enter, *command], check=check, capture_output=True, timeout=20)


def wait_until(
    condition: Callable[[], bool], seconds: float, what: str, details: Callable[[], str] = lambda: ""
) -> float:
    """Poll a condition; the seconds it took.

    Raises:
        AssertionError: it did not come true in time.
    """
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s: {what}\n{details()}"
        time.sleep(0.2)
    return time.monotonic() - start


def _die_with_parent() -> None:
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
