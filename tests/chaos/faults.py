"""The faults of a schedule: each does one thing to the laboratory, and says what, for how long and how it is undone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.chaos.chain import Chain, Row
from tests.disks import remount, used_kib
from tests.slurm.lab import Lab

DISK_SIZE = "512m"
PORT = 8123
SPARE_KIB = 8
RANKS = r"^[^ ]*python[^ ]* [^ ]*(launch|tools)/"
MANAGERS = r"^slurmstepd: \[[0-9]+\.[0-9]+\]"
LAUNCHERS = r"[s]lurm_script"


class ImpossibleError(Exception):
    """This fault cannot happen now."""


@dataclass
class Effect:
    """What a fault has done."""

    said: str
    seconds: float = 0.0
    """Until it is undone."""
    undo: Callable[[], object] | None = None
    target: str = ""
    """Nothing else happens to this one until then."""


@dataclass
class World:
    """What faults act on."""

    lab: Lab
    chain: Chain
    draw: Random
    last_step: int
    """Of the training."""
    disk: Path | None = None
    """That the run folder lies on, if it may be filled."""
    server: SummaryServer | None = None
    damaged: set[str] = field(default_factory=set)
    """Shards that were damaged at some time."""
    broken: set[str] = field(default_factory=set)
    """Machines and the like that have a fault already."""

    def sound(self, name: str) -> str:
        if name in self.broken:
            raise ImpossibleError
        return name

    def a_node(self) -> str:
        """One that is sound while at most one is not: the chain needs two."""
        sound = [node for node in self.lab.nodes if node not in self.broken]
        if len(sound) < len(self.lab.nodes):
            raise ImpossibleError
        return self.draw.choice(sound)

    def seconds(self, least: float, most: float) -> float:
        return self.draw.uniform(least, most)

    def asked_server(self, row: Row) -> SummaryServer:
        if self.server is None or row.stage != "summarize":
            raise ImpossibleError
        self.sound("server")
        return self.server

    def kill(self, pattern: str) -> str:
        """Kill one process whose command line matches, on some sound node; where."""
        nodes = [node for node in self.lab.nodes if node not in self.broken]
        for node in self.draw.sample(nodes, len(nodes)):
            found = self.lab.run(processes(pattern), on=node, check=False).split()
            if found:
                pid = self.draw.choice(found)
                self.lab.run(f"kill -9 {pid}", on=node, check=False)
                return f"pid {pid} on {node}"
        raise ImpossibleError

    def kill_some(self, pattern: str) -> str:
        """The same where none need be there."""
        try:
            return self.kill(pattern)
        except ImpossibleError:
            return "none was there"


class SummaryServer:
    """The server of ``tests/chaos/server.py`` on the machine of the controller."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self.flag, self._pid = lab, lab.folder / "log" / "unwell", ""
        self.start()

    def start(self) -> None:
        command = f"python -m tests.chaos.server {PORT} {self.flag} 0.0.0.0"
        self._pid = self._lab.run(f"{command} >>{self._lab.folder}/log/server.log 2>&1 & echo $!").strip()

    def kill(self) -> None:
        self._lab.run(f"kill -9 {self._pid}", check=False)


def processes(pattern: str) -> str:
    """A shell script that prints the ids of the machine's processes whose command line matches."""
    test = f"tr '\\0' ' ' <$p/cmdline | grep -qE -- '{pattern}'"
    return f"exec 2>/dev/null; for p in /proc/[0-9]*; do if {test}; then echo ${{p#/proc/}}; fi; done; true"


def kill_rank(world: World, row: Row) -> Effect:
    return Effect(f"rank killed: {world.kill(RANKS)}")


def kill_task(world: World, row: Row) -> Effect:
    return Effect(f"slurmstepd of the tasks killed: {world.kill(MANAGERS)}")


def kill_launcher(world: World, row: Row) -> Effect:
    return Effect(f"batch script killed: {world.kill(LAUNCHERS)}")


def kill_slurmd(world: World, row: Row) -> Effect:
    node, lab = world.a_node(), world.lab
    lab.stop_daemon(node, with_signal="KILL")
    return Effect(f"slurmd of {node} killed", world.seconds(1, 12), lambda: lab.start_daemon(node), node)


def kill_controller(world: World, row: Row) -> Effect:
    name, lab, number = world.sound("ctl"), world.lab, world.draw.choice(["TERM", "KILL"])
    lab.stop_daemon(name, with_signal=number)
    return Effect(f"slurmctld ended by {number}", world.seconds(1, 8), lambda: lab.start_daemon(name), name)


def cut_power(world: World, row: Row) -> Effect:
    node, lab = world.a_node(), world.lab
    lab.power_off(node)
    return Effect(f"power of {node} cut", world.seconds(1, 15), lambda: lab.boot(node), node)


def cut_network(world: World, row: Row) -> Effect:
    node, lab = world.a_node(), world.lab
    lab.unplug(node)
    return Effect(f"network of {node} cut", world.seconds(2, 20), lambda: lab.plug(node), node)


def preempt(world: World, row: Row) -> Effect:
    world.lab.run("sbatch -J urgent -p urgent -N3 --exclusive -o /dev/null --wrap 'sleep 1'", check=False)
    return Effect("urgent job on all nodes")


def requeue(world: World, row: Row) -> Effect:
    world.lab.run(f"scontrol requeue {row.job}", check=False)
    return Effect(f"job {row.job} requeued")


def cancel(world: World, row: Row) -> Effect:
    world.lab.run(f"scancel {row.job}", check=False)
    return Effect(f"job {row.job} cancelled")


def limit_time(world: World, row: Row) -> Effect:
    def set_minutes(minutes: int) -> None:
        world.lab.run(f"scontrol update JobId={row.job} TimeLimit={minutes}", check=False)

    set_minutes(1)
    return Effect(f"job {row.job} has a time limit of 1 minute", 35, lambda: set_minutes(60))


def fill_disk(world: World, row: Row) -> Effect:
    disk, name = world.disk, world.sound("disk")
    if disk is None:
        raise ImpossibleError
    remount(disk, f"size={used_kib(disk) + SPARE_KIB}k")
    return Effect("disk full", world.seconds(2, 8), lambda: remount(disk, f"size={DISK_SIZE}"), name)


def move_clock(world: World, row: Row) -> Effect:
    node, seconds = world.sound(world.draw.choice(world.lab.nodes)), world.draw.choice([-600, 600])
    world.lab.run(f"echo {seconds} >{world.lab.folder}/run/clock", on=node)
    return Effect(f"clock of {node} is {seconds:+d} s off")


def damage_checkpoint(world: World, row: Row) -> Effect:
    """The newest of several, and a rank is killed so that the next start finds it.

    Where there is one only, the training asks the user to move it away.
    """
    step, run = world.chain.newest_step(), world.chain.run
    is_only = len(list(run.glob("checkpoints/step-*"))) < 2
    if row.stage != "train" or is_only or step >= 0.9 * world.last_step:
        raise ImpossibleError
    names = ("optimizer.safetensors", "adapter/adapter_model.safetensors")
    path = run / f"checkpoints/step-{step:06d}" / world.draw.choice(names)
    flip(path, world.draw)
    return Effect(f"{path.relative_to(run)} damaged; rank killed: {world.kill_some(RANKS)}")


def damage_shard(world: World, row: Row) -> Effect:
    """Until it is restored; a rank is killed so that the next start reads it."""
    split, name = {"train": "train", "evaluate": "test"}.get(row.stage, "none"), world.sound("shard")
    shards = sorted(world.chain.run.glob(f"shards/{split}/*.tar"))
    if not shards:
        raise ImpossibleError
    path = world.draw.choice(shards)
    world.damaged.add(str(path))
    kept = path.read_bytes()
    flip(path, world.draw)

    def restore() -> None:
        with open(path, "r+b") as stream:
            stream.write(kept)

    said = f"{path.relative_to(world.chain.run)} damaged; rank killed: {world.kill_some(RANKS)}"
    return Effect(said, world.seconds(40, 60), restore, name)


def flip(path: Path, draw: Random) -> None:
    """Change one bit in the second half of a file."""
    place = draw.randrange(path.stat().st_size // 2, path.stat().st_size)
    with open(path, "r+b") as stream:
        stream.seek(place)
        value = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([value ^ 1 << draw.randrange(8)]))


def server_errors(world: World, row: Row) -> Effect:
    server = world.asked_server(row)
    server.flag.touch()
    return Effect("server answers 503", world.seconds(2, 8), server.flag.unlink, "server")


def kill_server(world: World, row: Row) -> Effect:
    server = world.asked_server(row)
    server.kill()
    return Effect("server killed", world.seconds(1, 6), server.start, "server")


def submit_twin(world: World, row: Row) -> Effect:
    name, job = world.sound("twin"), world.chain.submit_twin(row.stage)
    if not job:
        raise ImpossibleError
    said = f"{row.stage} submitted again as job {job}"
    return Effect(said, world.seconds(8, 25), lambda: world.lab.run(f"scancel {job}", check=False), name)


KINDS: dict[str, Callable[[World, Row], Effect]] = {
    "rank": kill_rank,
    "task": kill_task,
    "launcher": kill_launcher,
    "slurmd": kill_slurmd,
    "controller": kill_controller,
    "power": cut_power,
    "network": cut_network,
    "preemption": preempt,
    "requeue": requeue,
    "cancel": cancel,
    "time limit": limit_time,
    "disk": fill_disk,
    "clock": move_clock,
    "checkpoint": damage_checkpoint,
    "shard": damage_shard,
    "server errors": server_errors,
    "server death": kill_server,
    "twin": submit_twin,
}


def clock_option(lab: Lab) -> str:
    """Options of srun by which the tasks have the clock of their machine; files keep the file server's stamps."""
    library = lab.folder / "etc" / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("clock.c")], check=True)
    return f"--export=ALL,LD_PRELOAD={library},TRSR_CLOCK={lab.folder}/run/clock"
