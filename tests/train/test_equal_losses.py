"""Losses do not depend on ZeRO stage, offloading, number of ranks, packing or sharing: all equal a plain loop's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.spawn import run_ranks
from tests.train.world import NUM_STEPS, link_run, losses_of, make_config, plain_losses, train_all
from trsr_dist.config import load_config

OFFLOAD = {"device": "cpu"}
STAGES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": OFFLOAD},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3_offload": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
}
STEPS_BY_RANKS = {1: 10, 2: NUM_STEPS, 4: 10}


@pytest.fixture(scope="module")
def plain(source: Path) -> dict[int, list[float]]:
    """By the number of steps, on which the schedule depends."""
    counts = set(STEPS_BY_RANKS.values())
    return {count: plain_losses(make_config(source, train={"max_steps": count}), count) for count in counts}


@pytest.mark.parametrize(("num_ranks", "num_steps"), STEPS_BY_RANKS.items())
def test_losses_equal_a_plain_loop(
    source: Path, plain: dict[int, list[float]], tmp_path: Path, num_ranks: int, num_steps: int
) -> None:
    """All stages in one process group: a start of the ranks takes longer than their steps."""
    names = [name for name in STAGES if num_ranks == 2 or "offload" not in name]
    for name in names:
        run = link_run(tmp_path / name, source)
        (run / "ds.json").write_text(json.dumps({"zero_optimization": STAGES[name]}))
        make_config(run, train={"deepspeed_config": str(run / "ds.json"), "max_steps": num_steps})
    run_ranks(train_all, num_ranks, [tmp_path / name for name in names])
    expected = plain[num_steps]
    assert max(expected) - min(expected) > 0.1, "the loop must learn, or equal losses say nothing"
    for name in names:
        losses = losses_of(tmp_path / name)
        assert sorted(losses) == list(range(1, num_steps + 1)), name
        assert [losses[step] for step in sorted(losses)] == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize(
    ("names", "compiled"),
    [
        (("zero1", "zero3"), False),
        pytest.param(("zero0", "zero1", "zero2"), True, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_losses_with_selective_recomputation_and_compiled_layers(
    source: Path, tmp_path: Path, names: tuple[str, ...], compiled: bool
) -> None:
    for name in names:
        run = link_run(tmp_path / name, source)
        (run / "ds.json").write_text(json.dumps({"zero_optimization": STAGES[name]}))
        changes = {"deepspeed_config": str(run / "ds.json"), "max_steps": 6, "activation_checkpointing": "selective"}
        config = make_config(run, train=changes, model={"compile": compiled, "name_or_path": "RUN/base"})
    run_ranks(train_all, 2, [tmp_path / name for name in names])
    expected = plain_losses(config, 6)
    for name in names:
        losses = losses_of(tmp_path / name)
        assert [losses[step] for step in sorted(losses)] == pytest.approx(expected, abs=1e-5), name


def train_in_short_pieces(rank: int, world_size: int, run: Path) -> None:
    from trsr_dist.model import inputs
    from trsr_dist.train.job import train

    inputs.HEAD_ROWS = 64
    assert train(load_config(run / "config.yaml")) == 0


def test_full_text_of_unequal_rows_under_divided_weights(source: Path, tmp_path: Path) -> None:
    """The output head is gathered for each piece of a row: the ranks' rows have different numbers of targets."""
    run = link_run(tmp_path / "run", source)
    (run / "ds.json").write_text(json.dumps({"zero_optimization": STAGES["zero3"]}))
    train = {"deepspeed_config": str(run / "ds.json"), "loss": "full_text", "max_steps": 6, "timeout_seconds": 30}
    config = make_config(run, train=train)
    run_ranks(train_in_short_pieces, 2, run)
    losses = losses_of(run)
    assert [losses[step] for step in sorted(losses)] == pytest.approx(plain_losses(config, 6), abs=1e-5)
