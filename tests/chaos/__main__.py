"""Random faults over the whole chain on the Slurm laboratory, schedule after schedule; exit status 1 where one ends in
anything but the undisturbed run. What is in the output already is not run again.

example: python -m tests.chaos --seed 0 --schedules 10 --output build/chaos.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.chaos.chain import Chain
from tests.chaos.compare import differences, leftovers, told_of_damage, wrong_names
from tests.chaos.faults import DISK_SIZE, KINDS, PORT, SummaryServer, World, clock_option
from tests.chaos.storm import Storm
from tests.disks import mounted_disk
from tests.slurm.lab import NETWORK, Lab, wait_until, what_is_missing

LAST_STEP = 100
SETTINGS = [
    "demo.num_users=300", "demo.num_items=200", "run.tensorboard=false",
    "summarize.engine=openai", "summarize.model=small", f"summarize.base_url=http://{NETWORK}.1:{PORT}/v1",
    "summarize.users_per_shard=10", "summarize.lease_seconds=8", "summarize.max_in_flight=4",
    "base.steps=5", "base.hidden_size=32", "base.num_layers=2", "base.intermediate_size=64", "base.vocab_size=600",
    f"train.max_steps={LAST_STEP}", "train.save_every_steps=4", "train.log_every_steps=1", "train.rows_per_step=4",
    "train.row_tokens=700", "train.learning_rate=1e-3", "train.timeout_seconds=30", "evaluate.bootstrap_samples=20",
]  # fmt: skip
CALM_SECONDS, FAULT_SECONDS = 600, 40
"""What a chain may take undisturbed, and for every fault."""


def main() -> int:
    """Run the seeds that are missing, write what was found after each."""
    args = parse_arguments()
    if missing := what_is_missing():
        print(missing)
        return 2
    known = json.loads(args.output.read_text()) if args.output.exists() else []
    done = {(entry["seed"], entry["faults"]) for entry in known if not entry["differences"]}
    folder = args.output.with_suffix("")
    shutil.rmtree(folder / "calm", ignore_errors=True)
    failed = 0
    for seed in range(args.seed, args.seed + args.schedules):
        if (seed, args.faults) in done:
            continue
        if not (folder / "calm").exists():
            run_schedule(seed, 0, folder)
        entry = run_schedule(seed, args.faults, folder)
        known = [old for old in known if (old["seed"], old["faults"]) != (seed, args.faults)] + [entry]
        args.output.write_text(json.dumps(known, indent=2) + "\n")
        failed += bool(entry["differences"])
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the first schedule (default: 0)")
    add("--schedules", type=int, default=1, metavar="N", help="seeds from there on (default: 1)")
    add("--faults", type=int, default=50, metavar="N", help="of a schedule (default: 50)")
    add("--output", type=Path, default=Path("build/chaos.json"), metavar="FILE", help="default: %(default)s")
    return parser.parse_args()


def run_schedule(seed: int, num_faults: int, folder: Path) -> dict[str, object]:
    """One chain in a new laboratory; without faults it becomes the undisturbed run ``folder/calm``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"seed-{seed}-{num_faults}" if num_faults else "calm"
    started, date = time.monotonic(), time.strftime("%Y-%m-%d %H:%M")
    with open(folder / f"{name}.log", "w", buffering=1) as stream, world_of(seed) as world:

        def log(line: str) -> None:
            stream.write(line + "\n")
            print(line, flush=True)

        storm = Storm(world, num_faults, world.draw, list(KINDS), log)
        found = []
        try:
            storm.run(CALM_SECONDS + FAULT_SECONDS * num_faults)
            found = judge(world, folder / "calm" if num_faults else None)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        for line in found:
            log(line)
        if found or not num_faults:
            shutil.copytree(world.chain.run, folder / name, symlinks=True, dirs_exist_ok=True)
        told = "\n".join(told_of_damage(world.chain.run))
        seconds = round(time.monotonic() - started)
        counts = f"{storm.num_done} faults, {world.chain.num_submissions} submissions, {len(found)} differences"
        log(f"{name}: {counts}, {seconds} s")
        return {
            "seed": seed, "faults": num_faults, "done": storm.num_done, "kinds": storm.counts, "date": date,
            "seconds": seconds, "submissions": world.chain.num_submissions, "differences": found,
            "damaged_shards": len(world.damaged), "named": sum(map(told.count, world.damaged)),
        }  # fmt: skip


def judge(world: World, calm: Path | None) -> list[str]:
    """What is not as it should be."""
    wait_until(lambda: world.chain.queue() == [], 60, "all jobs have left", world.lab.queue)
    found = [*leftovers(world), *wrong_names(world.chain.run, world.damaged)]
    return found + (list(differences(world.chain.run, calm, world.last_step)) if calm else [])


@contextmanager
def world_of(seed: int) -> Iterator[World]:
    """Three nodes, a run folder on a disk that can be filled, and a server of summaries."""
    with (
        tempfile.TemporaryDirectory(prefix="trsr-chaos-") as place,
        mounted_disk(Path(place) / "disk", DISK_SIZE) as disk,
        Lab(nodes=3, cpus=2, gpus=1) as lab,
    ):
        draw = Random(seed)
        limits = {"TRSR_IDLE_RESTARTS": "6", "TRSR_TASK_SECONDS": "30"}
        chain = Chain(lab, disk / "run", SETTINGS, draw, TRSR_SRUN_OPTIONS=clock_option(lab), **limits)
        yield World(lab, chain, draw, LAST_STEP, disk, SummaryServer(lab))


if __name__ == "__main__":
    sys.exit(main())
