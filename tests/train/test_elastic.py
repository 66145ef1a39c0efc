"""Weights and moments out of one engine and into another, of any ZeRO stage; real DeepSpeed, one process."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.model.world import ANSWERS, CPU, make_model, make_user, model_config
from trsr_dist.distributed import process_group
from trsr_dist.environment import Ranks
from trsr_dist.errors import CheckpointError, RunError
from trsr_dist.model.artifacts import POINTERS
from trsr_dist.model.inputs import RowInputs
from trsr_dist.model.recommender import Recommender
from trsr_dist.rows import pack_row
from trsr_dist.train import elastic
from trsr_dist.train.checkpoints import CheckpointFolder, TrainerState, read_checkpoint
from trsr_dist.train.elastic import Saving, adam_step, check_names, gather_state, restore_state, start_from
from trsr_dist.train.engine import Engine, complete_zero_config
from trsr_dist.train.losses import LossSettings, row_loss

ROW = pack_row([make_user("a", 9, (3, 2)), make_user("b", 7, (4,))])
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with process_group(Ranks(), always=True):
        yield


def make_engine(stage: int, precision: str = "float32") -> Engine:
    config = model_config(num_hidden_layers=1)
    small = {"reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}  # the defaults take gigabytes
    settings = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0} | small}
    zero_config = complete_zero_config(settings, 1, 1, precision, 1.0, on_gpu=False)
    model = make_model(config, getattr(torch, precision))
    return Engine(Recommender(model, ANSWERS, "dense"), zero_config, 0.01, (0.9, 0.99))


def train(engine: Engine, *rates: float) -> dict[str, torch.Tensor]:
    """A step at each learning rate; the state after them."""
    for rate in rates:
        loss = row_loss(engine.wrapped, RowInputs(ROW, CPU), LossSettings("answer", ANSWERS, 100))
        engine.backward(loss.total / ROW.num_answers)
        engine.step(rate)
    return gather_state(engine)


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max() + 1e-9, name


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    """After two steps at stage 0."""
    return train(make_engine(0), 0.01, 0.02)


def test_the_state_is_whole_and_in_float32_on_the_cpu(trained: dict[str, torch.Tensor]) -> None:
    names = {name for name in make_model(model_config(num_hidden_layers=1)).state_dict() if "lora_" in name}
    assert trained.keys() == {f"{kind}/{name}" for kind in KINDS for name in names}
    assert {(tensor.dtype, tensor.device.type) for tensor in trained.values()} == {(torch.float32, "cpu")}
    assert all(tensor.any() for tensor in trained.values())


def test_the_state_is_a_copy(trained: dict[str, torch.Tensor]) -> None:
    engine = make_engine(0)
    before = gather_state(engine)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    train(engine, 0.01)
    assert all(torch.equal(before[name], tensor) for name, tensor in kept.items())


class GatedFolder(CheckpointFolder):
    """Saves when its gate is open."""

    gate = threading.Event()

    def save(self, *args: Any) -> Path:
        assert self.gate.wait(60)
        return super().save(*args)


def test_a_checkpoint_of_its_step_is_written_behind_the_next_ones(tmp_path: Path) -> None:
    engine = make_engine(0)
    saving, expected = Saving(engine, GatedFolder(tmp_path, 3), {}, lambda state: {}), gather_state(engine)
    saving.save(TrainerState(1, 1, {}, best_step=1))
    train(engine, 0.01)
    assert not list(tmp_path.iterdir())
    GatedFolder.gate.set()
    saving.wait()
    assert_close(read_checkpoint(tmp_path / "step-000001").tensors, expected, 0.0)
    assert {name: (tmp_path / name).read_text() for name in POINTERS} == dict.fromkeys(POINTERS, "step-000001\n")
    assert saving.write_seconds > 0
    saving.close()


def test_a_checkpoint_that_was_not_written_is_known_and_raised_once(tmp_path: Path) -> None:
    def fence() -> None:
        raise RunError("lost")

    saving = Saving(make_engine(0), CheckpointFolder(tmp_path, 3, fence), {}, lambda state: {})
    saving.save(TrainerState(1, 1, {}))
    saving.close()
    assert saving.has_failed
    with pytest.raises(RunError, match="lost"):
        saving.wait()
    assert not saving.has_failed


@pytest.mark.parametrize("stage", [1, 3])
def test_before_the_first_step_moments_are_zero(stage: int) -> None:
    engine = make_engine(stage)
    state = gather_state(engine)
    assert adam_step(engine) == 0
    for name, parameter in make_model(model_config(num_hidden_layers=1)).named_parameters():
        if parameter.requires_grad:
            assert torch.equal(state[f"weight/{name}"], parameter)
            assert not state[f"exp_avg/{name}"].any() and not state[f"exp_avg_sq/{name}"].any()


@pytest.mark.parametrize("held", [[(0, 5)], [(0, 6), (5, 5)], [(1, 9)], [(0, 4), (6, 6)], [(0, 12)], []])
def test_values_that_no_rank_or_two_hold_are_found(held: list[tuple[int, int]]) -> None:
    engine = SimpleNamespace(trainable=lambda: {"a": nn.Parameter(torch.zeros(2, 5))})
    elastic._check_spans(engine, [[(5, 5)], [(0, 5)], [(0, 0)]])
    with pytest.raises(CheckpointError, match=re.escape(f"a has 10 values, but the ranks hold {held}")):
        elastic._check_spans(engine, [[span] for span in held] + [[(0, 0)]])


def test_what_three_ranks_hold_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten values and of three; what the others send is put in its place here."""
    asked, parts = [], [torch.arange(4.0), torch.tensor([4.0, 5, 6, 7, 8, 9, 20]), torch.tensor([21.0, 22])]
    spans = [[(0, 4), (0, 0)], [(4, 6), (0, 1)], [(0, 0), (1, 2)]]
    parameters = {"a": nn.Parameter(torch.zeros(2, 5)), "b": nn.Parameter(torch.zeros(3))}
    mapping = SimpleNamespace(lp_fragment_address=SimpleNamespace(start=0), get_hp_fragment={None: parts[0]}.get)
    parameters["a"]._hp_mapping, parameters["b"]._hp_mapping = mapping, None
    engine = SimpleNamespace(stage=1, device=CPU, trainable=lambda: parameters)
    monkeypatch.setattr(elastic, "gather_on_rank_zero", lambda mine, sizes: asked.append((mine, sizes)) or parts)
    state = elastic._gather(engine, "weight", spans)
    assert list(state) == ["weight/a", "weight/b"]
    assert torch.equal(state["weight/a"], torch.arange(10.0).view(2, 5))
    assert state["weight/b"].tolist() == [20, 21, 22]
    assert [(mine.tolist(), sizes) for mine, sizes in asked] == [([0, 1, 2, 3], [4, 7, 2])]
    parts.clear()
    assert elastic._gather(engine, "weight", spans) == {}


@pytest.mark.parametrize(("rank", "first", "size"), [(0, 0, 4), (1, 4, 4), (2, 8, 2), (3, 12, 0)])
@pytest.mark.parametrize("key", [None, "exp_avg"])
def test_a_rank_of_stage_3_holds_its_part_without_padding(rank: int, first: int, size: int, key: str | None) -> None:
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_id, parameter.ds_numel = 7, 10
    values = {None: torch.arange(4.0), "exp_avg": torch.arange(4.0) + 10}
    parameter._z3_optimizer = SimpleNamespace(
        get_local_fp32_param=lambda of, which=None: {parameter: values}[of][which]
    )
    engine = SimpleNamespace(
        stage=3, zero_optimizer=SimpleNamespace(_get_param_partition_rank=lambda of: {parameter: rank}[of])
    )
    found_first, share = elastic._share(engine, parameter, key)
    assert (found_first, share.tolist()) == (first, values[key][:size].tolist())


def test_without_zero_the_first_rank_alone_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, parameter = SimpleNamespace(stage=0), nn.Parameter(torch.ones(2, 2))
    assert elastic._share(engine, parameter, None)[1].tolist() == [1] * 4
    monkeypatch.setattr(elastic, "is_rank_zero", lambda: False)
    first, share = elastic._share(engine, parameter, None)
    assert (first, share.shape) == (0, (0,))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_stage_goes_on_as_the_run_would_have(stage: int, trained: dict[str, torch.Tensor]) -> None:
    whole = train(make_engine(0), 0.01, 0.02, 0.03)
    engine = make_engine(stage)
    restore_state(engine, trained, 2)
    assert adam_step(engine) == 2
    assert_close(gather_state(engine), trained, 0.0)
    assert_close(train(engine, 0.03), whole, 1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_masters_keep_what_bfloat16_rounds(stage: int, trained: dict[str, torch.Tensor]) -> None:
    engine = make_engine(stage, "bfloat16")
    restore_state(engine, trained, 2)
    assert_close(gather_state(engine), trained, 0.0)
    for name, parameter in engine.trainable().items():
        rounded = trained[f"weight/{name}"].bfloat16()
        working = parameter.ds_tensor[: rounded.numel()].view_as(rounded) if stage == 3 else parameter
        assert torch.equal(working, rounded), name


@pytest.mark.parametrize("stage", [0, 2])
def test_a_start_from_weights_has_seen_no_step(stage: int, trained: dict[str, torch.Tensor]) -> None:
    weights = {name.removeprefix("weight/"): tensor for name, tensor in trained.items() if name.startswith("weight/")}
    engine = make_engine(stage)
    start_from(engine, weights)
    state = gather_state(engine)
    assert adam_step(engine) == 0
    for name, tensor in weights.items():
        assert torch.equal(state[f"weight/{name}"], tensor)
        assert not state[f"exp_avg/{name}"].any() and not state[f"exp_avg_sq/{name}"].any()


@pytest.mark.parametrize("change", ["missing", "more", "shape"])
def test_a_state_of_another_model_is_refused(change: str, trained: dict[str, torch.Tensor]) -> None:
    engine, state = make_engine(0), dict(trained)
    name = next(name for name in trained if name.startswith("weight/"))
    shape = tuple(trained[name].shape)
    if change == "missing":
        del state[name]
        message = f"{name} has shape None, this run's model {shape}"
    elif change == "more":
        state["weight/other"] = torch.zeros(2, 3)
        message = "weight/other has shape (2, 3), this run's model None"
    else:
        state[name] = torch.zeros(7, 1)
        message = f"{name} has shape (7, 1), this run's model {shape}"
    before = gather_state(engine)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        restore_state(engine, state, 2)
    assert_close(gather_state(engine), before, 0.0)
    check_names(engine, trained)
    with pytest.raises(CheckpointError, match=re.escape(f"{min(trained)} has shape None")):
        check_names(engine, {})


@pytest.mark.parametrize(("rank", "expected"), [(0, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [8, 9, -1, -1])])
@pytest.mark.parametrize("key", [None, "exp_avg"])
def test_a_rank_takes_its_share_and_the_last_one_is_padded(rank: int, expected: list[int], key: str | None) -> None:
    """Ten values over three ranks; what DeepSpeed would ask other ranks for is put in its place here."""
    asked = []

    def partition(parameter: nn.Parameter, release_swap_buffers: bool, optim_state_key: str | None) -> tuple:
        asked.append((parameter, release_swap_buffers, optim_state_key))
        return part, None

    part, parameter = torch.full((4,), -1.0), nn.Parameter(torch.zeros(0))
    parameter.ds_tensor = torch.full((4,), -1.0)
    optimizer = SimpleNamespace(
        _get_fp32_opt_state_partition=partition, _get_param_partition_rank=lambda of: {parameter: rank}[of]
    )
    elastic._write_partition(optimizer, parameter, torch.arange(10.0).view(2, 5), key)
    assert part.tolist() == expected and asked == [(parameter, False, key)]
    assert parameter.ds_tensor.tolist() == (expected if key is None else [-1] * 4)
    assert parameter.numel() == 0


def test_a_small_parameter_that_every_rank_holds_whole_is_set_whole() -> None:
    parameter = nn.Parameter(torch.zeros(2, 5))
    parameter.ds_tensor = torch.zeros(4)
    optimizer = SimpleNamespace(
        _get_fp32_opt_state_partition=lambda *_, **__: (torch.zeros(4), None),
        _get_param_partition_rank=lambda parameter: 1,
    )
    elastic._write_partition(optimizer, parameter, torch.arange(10.0).view(2, 5), None)
    assert torch.equal(parameter.data, torch.arange(10.0).view(2, 5))
    elastic._write_partition(optimizer, parameter, torch.zeros(2, 5), "exp_avg")
    assert parameter.any()
