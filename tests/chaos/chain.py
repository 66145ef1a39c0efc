"""A chain of jobs and its user, who looks at the queue and submits what is missing again, as the documents say."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.slurm.lab import Lab

STAGES = ("prepare", "summarize", "base", "train", "merge", "evaluate")
SCRIPTS = {stage: f"slurm/{stage}.sbatch" for stage in ("summarize", "train", "evaluate")}
SCRIPTS |= {stage: f"slurm/single.sbatch {stage}" for stage in ("prepare", "base", "merge")}
CONFIG = "configs/quickstart.yaml"
DONE = "everything is finished"
NO_PROGRESS = ("logs", "config", "heartbeats", "tensorboard", "leases", "progress")


@dataclass(frozen=True, slots=True)
class Row:
    """A job of the chain in the queue."""

    job: str
    stage: str
    state: str
    host: str
    """Where its batch script runs; empty where it does not."""
    start: str

    @property
    def is_running(self) -> bool:
        return self.state == "RUNNING"


class Chain:
    """The jobs of one run folder.

    Args:
        lab: where they run.
        run: the run folder.
        settings: beside those of ``CONFIG``.
        draw: numbers of nodes and tasks, of every submission.
        env: of the submission.
    """

    def __init__(self, lab: Lab, run: Path, settings: list[str], draw: Random, **env: str) -> None:
        self.lab, self.run, self.draw, self.env = lab, run, draw, env
        self.settings = " ".join([CONFIG, *settings, f"run.dir={run}"])
        self.num_submissions = 0

    def submit(self) -> str:
        """What the user types; what the script said, in one line."""
        self.num_submissions += 1
        nodes, tasks = self.draw.choice([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
        if self.num_submissions == 1:
            nodes, tasks = 2, 1
        options = f"--nodes={nodes} --ntasks-per-node={tasks}"
        env = {f"TRSR_{stage}_OPTIONS": options for stage in ("SUMMARIZE", "TRAIN", "EVALUATE")}
        env["TRSR_PREFLIGHT"] = str(int(self.num_submissions % 3 == 1))
        said = self.lab.run(f"slurm/pipeline.sh {self.settings}", env=env | self.env, check=False)
        jobs = " ".join(f"{stage} {job}" for stage, job in re.findall(r"^(\w+): job (\d+)", said, re.M))
        return DONE if DONE in said else f"{options}: {jobs or said.strip()[-300:]}"

    def submit_twin(self, stage: str) -> str:
        """The same stage once more on the same folder; its job, empty where there is none."""
        (self.run / "logs").mkdir(exist_ok=True)
        options = f"--parsable -N1 -n1 -J twin --no-requeue -o {self.run}/logs/twin-%j.out"
        env = {"TRSR_PREFLIGHT": "0", **self.env}
        said = self.lab.run(f"sbatch {options} {SCRIPTS[stage]} {self.settings}", env=env, check=False).strip()
        return said if said.isdigit() else ""

    def queue(self) -> list[Row] | None:
        """Jobs of the chain that have not ended; None where the controller does not answer."""
        said = self.lab.run("squeue -h -a -o '%A|%j|%T|%B|%S' && echo answered", check=False)
        if not said.rstrip().endswith("answered"):
            return None
        fields = [line.split("|") for line in said.splitlines() if line.count("|") == 4]
        rows = [Row(job, n.split("-")[1], s, h, t) for job, n, s, h, t in fields if n.startswith("trsr-")]
        return sorted(rows, key=lambda row: int(row.job))

    def others(self) -> list[str]:
        """Jobs that are not the chain's."""
        return self.lab.run("squeue -h -a -n twin,urgent -o %A", check=False).split()

    def progress(self) -> int:
        """Changes with everything new on the disk."""
        found = [Path(top, name) for top, folders, names in os.walk(self.run) for name in (*folders, *names)]
        files = [path for path in found if not set(path.relative_to(self.run).parts) & {*NO_PROGRESS}]
        shown = [path.relative_to(self.run) for path in files if path.name != "metrics.jsonl"]
        return hash(frozenset(str(path) for path in shown if not any(part.startswith(".") for part in path.parts)))

    def num_starts(self, stage: str) -> int:
        """How often the first task of a stage has begun."""
        return len(list(self.run.glob(f"logs/{stage}-*/task-0000-restart-*")))

    def newest_step(self) -> int:
        """Of the newest checkpoint; 0 where there is none."""
        return max((int(path.name[5:]) for path in self.run.glob("checkpoints/step-*")), default=0)

    def last_words(self) -> str:
        """Of all jobs of the chain, the newest last."""
        outs = sorted(self.run.glob("logs/*.out"), key=lambda path: path.stat().st_mtime)
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-700:]}" for path in outs[-4:])
