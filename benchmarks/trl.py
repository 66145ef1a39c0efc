"""A training step against TRL's SFTTrainer with packing, which runs in a separate environment."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.common import Row, rate_row, ratio_row
from benchmarks.training import Bench
from benchmarks.ways import REPEATS, SHAPE, make_user, matrix_rate, measure, suffix_lengths
from trsr_dist.records import TokenizedUser

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv/trl/bin/python"
INSTALL = "python3 -m venv .venv/trl && .venv/trl/bin/pip install torch==2.13.0 trl peft"
TIMEOUT_SECONDS = 400


@dataclass(frozen=True, slots=True)
class Case:
    """Users whose prompts are packed."""

    num_users: int
    prefix: int
    suffix: int
    num_candidates: int
    row_tokens: int
    """Of TRL's packed rows."""

    def users(self) -> list[TokenizedUser]:
        names = [f"user {number}" for number in range(self.num_users)]
        return [make_user(n, self.prefix, suffix_lengths(n, self.suffix, self.num_candidates)) for n in names]


CASES = (Case(4, 1024, 64, 2, 2200), Case(2, 1024, 64, 5, 2200))


def run(scale: float) -> list[Row]:
    """The same users, model, loss and precision; ours before and after TRL's epochs, which run in another process.

    ``scale`` below 1 leaves out the case of five candidates.
    """
    if not PYTHON.exists():
        return [_not_run(f"no {PYTHON.relative_to(ROOT)}; make it by {INSTALL}")]
    try:
        return [row for case in CASES[: 1 if scale < 1 else 2] for row in compare(case)]
    except subprocess.CalledProcessError as error:
        return [_not_run(error.stderr.strip().splitlines()[-1])]
    except subprocess.TimeoutExpired as error:
        return [_not_run(f"no end within {error.timeout:.0f} s")]


def _not_run(reason: str) -> Row:
    return Row("trl", "SFTTrainer, packed", "ratio to ours", float("nan"), "x", f"not run: {reason}")


def compare(case: Case) -> list[Row]:
    """Users a CPU second."""
    bench = Bench(LlamaConfig(**SHAPE), matrix_rate())
    users = case.users()
    ways = [bench.ours(users, share_head=False)]
    before = measure(ways, REPEATS)[0].times
    theirs = epochs(case)
    ours = [(first + last) / 2 for first, last in zip(before, measure(ways, REPEATS)[0].times, strict=True)]
    name = f"prefix {case.prefix}, suffixes to {case.suffix}, 1+{case.num_candidates - 1}"
    return [
        rate_row("trl", name, "ours", case.num_users, ours, "users/CPU-s"),
        rate_row("trl", name, "SFTTrainer, packed", case.num_users, theirs, "users/CPU-s"),
        ratio_row("trl", name, "SFTTrainer, packed / ours", theirs, ours, bench.packed(users).flops / ways[0].flops),
    ]


def epochs(case: Case) -> list[float]:
    """CPU seconds of TRL's epochs, without the first."""
    prompts = [[*user.prefix, *suffix] for user in case.users() for suffix in user.suffixes]
    task = json.dumps({"prompts": prompts, "row_tokens": case.row_tokens, "num_epochs": 1 + REPEATS})
    command = [str(PYTHON), "-m", "benchmarks.trl_worker"]
    done = subprocess.run(
        command, cwd=ROOT, input=task, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])[1:]
