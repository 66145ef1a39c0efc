"""What a start refuses: another base or adapter under a checkpoint, other settings after the end, a hasty --force."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.shards.world import flip_byte
from tests.spawn import run_ranks
from tests.train.world import FEW_STEPS, make_run, start
from tests.train.world import start as train_here
from trsr_dist.cli import EXIT_REQUEUE
from trsr_dist.errors import CheckpointError
from trsr_dist.files import sha256_of
from trsr_dist.shards.plan import TrainPlan
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@contextmanager
def other_weights(run: Path) -> Iterator[None]:
    """The base's weights are others, of the same names and shapes."""
    kept = shutil.copytree(run / "base", run / "kept")
    for path in (run / "base").glob("*.safetensors"):
        tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    yield
    shutil.rmtree(run / "base")
    kept.rename(run / "base")


def start_many_times(rank: int, world_size: int, run: Path) -> dict[str, Any]:
    longer = {"train": {"max_steps": FEW_STEPS + 1}}
    found = {"first": start(run)}
    latest, best = run / "checkpoints" / "latest", run / "checkpoints" / "best"
    latest.unlink()  # as if killed before it was written
    best.write_text("step-000009\n")
    found["again"] = start(run)
    found["pointers"] = (latest.read_text(), best.unlink())
    found["other precision"] = start(run, train={"precision": "bfloat16"})
    found["any precision"] = start(run, train={"precision": "auto"})
    found["other rate"] = start(run, train={"learning_rate": 1e-6})
    found["fewer steps"] = start(run, train={"max_steps": 1})
    found["rate on record"] = yaml.safe_load((run / "config" / "train.yaml").read_text())["train"]["learning_rate"]
    with other_weights(run):
        found["other base"] = start(run, **longer)
    found["other alpha"] = start(run, lora={"alpha": 80}, **longer)
    found["quantized"] = start(run, model={"quantization": "8bit"}, **longer)
    found["other targets"] = start(run, lora={"target_modules": ["q_proj"]}, **longer)
    found["other rows"] = start(run, train={"row_tokens": 800})
    found["force with a typo"] = start(run, True, model={"name_or_path": "/no/such"})
    found["more tokens than positions"] = start(run, True, prompt={"max_tokens": 9999}, train={"row_tokens": 9999})
    found["kept"] = checkpoints(run)
    found["same targets"] = start(run, lora={"target_modules": ["o_proj", "k_proj", "v_proj", "q_proj"]}, **longer)
    found["force"] = start(run, True, train={"max_steps": 1})
    found["kept after force"] = checkpoints(run)
    early = {"learning_rate": 1e-30, "evaluate_every_steps": 1, "evaluate_users": 2, "early_stopping_patience": 1}
    found["early end"] = (start(run, True, train=early | {"max_steps": 4}), checkpoints(run)[-1])
    found["more steps"] = start(run, train=early | {"max_steps": 5})
    found["more patience"] = start(run, train=early | {"max_steps": 3, "early_stopping_patience": 2})
    found["kept after more patience"] = checkpoints(run)[-1]
    other = early | {"best_metric": "mrr@3", "evaluate_every_steps": 9}
    found["best before"] = best.read_text()
    found["other metric"] = (start(run, train=other | {"max_steps": 3, "early_stopping_patience": 2}), best.read_text())
    found["on by it"] = (start(run, train=other | {"max_steps": 9, "walltime_seconds": 0.1}), checkpoints(run))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), num_users=40)


@pytest.fixture(scope="module")
def found(run: Path) -> dict[str, Any]:
    return run_ranks(start_many_times, 1, run)[0]


def test_a_finished_training_with_other_settings_is_not_taken_for_this_one(found: dict) -> None:
    assert (found["first"], found["again"], found["any precision"]) == ("0", "0", "0")
    assert found["pointers"][0] == "step-000002\n"
    assert "train.precision='float32', now 'bfloat16'" in found["other precision"]
    assert found["other rate"].startswith("RunError")
    assert "train.learning_rate=0.005, now 1e-06; use another run.dir, --force" in found["other rate"]
    assert "steps=2, now 1" in found["fewer steps"]
    assert found["rate on record"] == 5e-3


def test_more_steps_after_an_early_end_need_more_patience(found: dict) -> None:
    assert found["early end"] == ("0", "step-000002")
    assert "steps=4, now 5" in found["more steps"]
    assert "a larger train.early_stopping_patience" in found["more steps"]
    assert "train.max_steps" not in found["more steps"], "they would change nothing"
    assert found["more patience"] == "0" and found["kept after more patience"] == "step-000003"


def test_the_best_by_one_metric_is_not_taken_for_that_by_another(found: dict) -> None:
    assert found["other metric"][1] == found["best before"], "what is refused changes nothing"
    assert "train.best_metric='ndcg@10', now 'mrr@3'; use another run.dir" in found["other metric"][0]
    code, kept = found["on by it"]
    assert code == str(EXIT_REQUEUE) and "step-000004" in kept and "best" not in kept, "nothing was ranked by it yet"


def test_a_checkpoint_keeps_its_base_and_its_adapter(found: dict, run: Path) -> None:
    assert found["other base"].startswith("CheckpointError")
    assert "trained on base" in found["other base"] and "name or restore that base" in found["other base"]
    assert "lora.alpha=8.0, now 80.0" in found["other alpha"]
    assert "lora.target_modules=" in found["other targets"]
    assert "model.quantization='none', now '8bit'" in found["quantized"]
    assert re.match(rf"CheckpointError: {run}/checkpoints/step-\d+: .* train.row_tokens: set", found["other rows"])
    assert found["same targets"] == "0", "their order says nothing"


def test_prompts_longer_than_the_positions_are_refused(found: dict) -> None:
    assert found["more tokens than positions"].startswith("ConfigError: prompt.max_tokens=9999")
    assert "set prompt.max_tokens=" in found["more tokens than positions"]


def test_force_removes_nothing_before_all_is_checked(found: dict) -> None:
    assert "no such model folder" in found["force with a typo"]
    assert found["kept"] == ["latest", "step-000002"]
    assert found["force"] == "0"
    assert found["kept after force"] == ["latest", "step-000001"]


def read_unequally(rank: int, world_size: int, root: Path) -> list[str]:
    """One rank meets a disk that fails once, then another folder than the others, then another base."""
    from trsr_dist.train import prepare, start
    from trsr_dist.train.checkpoints import Checkpoint, CheckpointFolder, read_checkpoint

    def fail(folder: Path) -> Checkpoint:
        raise CheckpointError(f"{folder}: Stale file handle")

    def refuse(folder: Path) -> Checkpoint:
        raise PermissionError(13, "Permission denied", str(folder))

    def differ(folder: Path) -> Checkpoint:
        return replace(read_checkpoint(folder), digest="0123")

    errors = []
    for read in (fail, refuse, differ, read_checkpoint):
        start.read_checkpoint = read if rank else read_checkpoint
        try:
            errors.append(start.newest_for_all(CheckpointFolder(root, 3)).folder.name)
        except CheckpointError as error:
            errors.append(str(error))
    fingerprint = prepare.base_fingerprint
    prepare.base_fingerprint = lambda folder: "0123" if rank else fingerprint(folder)
    return [*errors, train_here(root.parent)]


def test_no_rank_goes_on_from_a_different_checkpoint_or_base(found: dict, run: Path) -> None:
    host, newest = os.uname().nodename, max(path.name for path in (run / "checkpoints").glob("step-*"))
    for failed, refused, differed, name, base in run_ranks(read_unequally, 2, run / "checkpoints"):
        assert f"rank 1 on {host} cannot read" in failed and "Stale file handle" in failed
        assert f"rank 1 on {host} cannot read" in refused and "Permission denied" in refused
        step = f"step {int(newest[5:])}, manifest"
        assert re.search(rf"rank 1 on {host} finds {step} 0123, rank 0 on {host} {step} ", differed)
        assert name == newest
        assert re.match(
            rf"ModelError: the base .*/base: rank 1 on {host} finds fingerprint 0123\.\.\., rank 0 on", base
        )


def train_on_other_shards(rank: int, world_size: int, run: Path) -> dict[str, str]:
    """Rank 1 finds one split as it was before, then makes other rows of the same."""
    from trsr_dist.train import prepare

    def elsewhere(split: str) -> Callable[..., ShardSet]:
        return lambda folder, *rest, **more: ShardSet(
            run / "earlier" / split if folder.name == split and rank else folder, *rest, **more
        )

    class OtherPlan(TrainPlan):
        identity = "0123" if rank else TrainPlan.identity

    def plan_otherwise(*args: Any) -> TrainStream:
        stream = TrainStream(*args)
        stream.plan.__class__ = OtherPlan
        return stream

    found, steps = {}, {"evaluate_every_steps": 1, "max_steps": FEW_STEPS + 1}
    for split in ("train", "valid"):
        prepare.ShardSet = elsewhere(split)
        found[split] = start(run, train=steps)
    prepare.ShardSet, prepare.TrainStream = ShardSet, plan_otherwise
    return found | {"plan": start(run, train=steps)}


def test_no_rank_trains_or_ranks_with_other_shards(found: dict, run: Path) -> None:
    """Their lengths are measured, so that nothing else would stop the training."""
    shutil.copytree(run / "shards", run / "earlier")
    for split in ("train", "valid"):
        path = run / "earlier" / split / "manifest.json"
        before = sha256_of(path)
        path.write_text(path.read_text() + "\n")
        for summary in path.parent.glob("lengths-*/summary.json"):
            summary.write_text(summary.read_text().replace(before, sha256_of(path)))
    host = os.uname().nodename
    for rank in run_ranks(train_on_other_shards, 2, run):
        for split in ("train", "valid"):
            words = rf"/{split}: rank 1 on {host} finds manifest \w+\.\.\..*, rank 0 on {host} manifest"
            assert re.match(rf"DataError: .*{words}", rank[split])
        assert re.match(r"DataError: .*/train: rank 1 on .* finds rows of plan 0123 and teacher", rank["plan"])


def train_on_damage(rank: int, world_size: int, run: Path) -> list[str]:
    """Each start makes one step, until one ends otherwise."""
    skip = {"data_errors": "skip", "max_data_errors": 5, "max_steps": 9, "walltime_seconds": 0.1}
    found = [start(run, train=skip)]
    if rank == 0:
        shards = ShardSet(run / "shards" / "train")
        for number in range(6):
            flip_byte(shards.path(0), int(shards.shard(0).rows[number]["offset"]) + 9)
    while len(found) < 9 and found[-1] == str(EXIT_REQUEUE):
        found.append(start(run, train=skip))
    return found


def test_samples_left_out_are_counted_over_ranks_and_starts(tmp_path: Path) -> None:
    one, two = run_ranks(train_on_damage, 2, make_run(tmp_path, num_users=20))
    assert one == two and len(one) > 3
    assert re.search(r"DataError: .*sample \d .*; that makes [6-9], train.max_data_errors allows 5$", one[-1])
