"""Whether a disturbed run is like the undisturbed one, and what it has left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load_file

from tests.chaos.faults import World, processes
from tests.train.world import losses_of
from trsr_dist.files import read_json
from trsr_dist.metric_log import read_metrics

LOSS, WEIGHT, METRIC = 1e-5, 1e-5, 1e-6
"""Largest differences. Another number of ranks sums in another order, which Adam magnifies where a gradient is near 0;
a step that is lost or made twice moves weights by up to the learning rate, 1e-3."""
LEFT = (".*.lock", ".*.takeover*", ".*.tmp-*", ".*.old-*", ".*.partial-*", "leases/*")
"""Not the claims: that of a killed process stays until the next job of its stage looks round, and keeps nobody out."""
OURS = r"[l]aunch/|[t]ools/|[s]lurm_script|[s]lurm/task"


def differences(run: Path, calm: Path, last_step: int) -> Iterator[str]:
    """A line for everything in which a run is not like the other."""
    yield from _bytes(run, calm, ("histories/*", "base/*", "shards/*/*"))
    mine, its = losses_of(run), losses_of(calm)
    logged = [row["step"] for row in read_metrics(run) if "train/loss" in row]
    if logged != list(range(1, last_step + 1)):
        yield f"metrics.jsonl: {len(logged)} steps, {len(set(logged))} different ones, of {last_step}"
    elif (worst := max(abs(mine[step] - its[step]) for step in its)) > LOSS:
        yield f"losses differ by {worst:.2g}"
    if (worst := weight_difference(run, calm, last_step)) > WEIGHT:
        yield f"adapters differ by {worst:.2g}"
    yield from _metrics(*(read_json(folder / "evaluation/test.json")["metrics"] for folder in (run, calm)))


def weight_difference(run: Path, calm: Path, last_step: int) -> float:
    """Largest difference of the adapters' weights."""
    name = f"checkpoints/step-{last_step:06d}/adapter/adapter_model.safetensors"
    mine, its = load_file(run / name), load_file(calm / name)
    return max((mine[key] - its[key]).abs().max().item() for key in mine.keys() | its.keys())


def _bytes(run: Path, calm: Path, patterns: tuple[str, ...]) -> Iterator[str]:
    for pattern in patterns:
        found = [{str(path.relative_to(folder)): path for path in folder.glob(pattern)} for folder in (run, calm)]
        yield from (f"{name}: only in one" for name in sorted(found[0].keys() ^ found[1].keys()))
        for name in sorted(found[0].keys() & found[1].keys()):
            if found[0][name].is_file() and found[0][name].read_bytes() != found[1][name].read_bytes():
                yield f"{name}: other bytes"


def _metrics(mine: object, its: object, name: str = "metrics") -> Iterator[str]:
    if isinstance(mine, dict) and isinstance(its, dict) and mine.keys() == its.keys():
        for key in mine:
            yield from _metrics(mine[key], its[key], f"{name}.{key}")
    elif isinstance(mine, list) and isinstance(its, list) and len(mine) == len(its):
        for place, pair in enumerate(zip(mine, its, strict=True)):
            yield from _metrics(*pair, f"{name}.{place}")
    elif isinstance(mine, float) and isinstance(its, float):
        if not abs(mine - its) <= METRIC:
            yield f"{name}: {mine}, undisturbed {its}"
    elif mine != its:
        yield f"{name}: {mine}, undisturbed {its}"


DAMAGE = ("the bytes are damaged", "its bytes are not those of the manifest")
"""Words of the errors about a sample and about a whole shard."""


def told_of_damage(run: Path) -> list[str]:
    """Lines of the logs about samples of damaged shards."""
    lines = "\n".join(path.read_text(errors="replace") for path in run.glob("logs/*/task-*")).splitlines()
    return [line for line in lines if any(words in line for words in DAMAGE)]


def wrong_names(run: Path, damaged: set[str]) -> Iterator[str]:
    """A log must name a shard that was damaged; one that no start has read is named nowhere."""
    yield from (f"not damaged: {line}" for line in told_of_damage(run) if not any(path in line for path in damaged))


def leftovers(world: World) -> Iterator[str]:
    """Stale locks, temporary files, processes."""
    run = world.chain.run
    yield from (str(path.relative_to(run)) for pattern in LEFT for path in run.rglob(pattern))
    for node in world.lab.nodes:
        for pid in world.lab.run(processes(OURS), on=node, check=False).split():
            yield f"{node}: " + world.lab.run(f"tr '\\0' ' ' </proc/{pid}/cmdline", on=node, check=False)
