"""A run that goes on from a checkpoint, on any number of ranks and any ZeRO stage, is the uninterrupted run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.spawn import run_ranks
from tests.train.world import link_run, losses_of, make_config, train_all
from trsr_dist.train.checkpoints import OPTIMIZER, WEIGHTS, read_checkpoint

SAVED_STEP, NUM_STEPS = 5, 12
LAST = f"step-{NUM_STEPS:06d}"
DROPOUT = {"dropout": 0.1}


def prepare(run: Path, source: Path, stage: int, start: Path | None = None) -> Path:
    """A run of this stage, with the checkpoint of another run in it where one is given."""
    link_run(run, source)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    (run / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    saving = {"save_every_steps": SAVED_STEP, "keep_checkpoints": 9}
    train = {"deepspeed_config": str(run / "ds.json"), "max_steps": NUM_STEPS} | saving
    make_config(run, train=train, lora={"r": 4, "alpha": 8} | DROPOUT)
    if start is not None:
        name = f"step-{SAVED_STEP:06d}"
        shutil.copytree(start / "checkpoints" / name, run / "checkpoints" / name)
    return run


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs of stages 2 and 3 on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {stage: prepare(folder / f"zero{stage}", source, stage) for stage in (2, 3)}
    run_ranks(train_all, 2, list(runs.values()))
    return runs


@pytest.fixture(scope="module")
def resumed(
    source: Path, whole: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, int, int], Path]:
    """Runs that go on from the saved step, by (stage before, stage after, number of ranks)."""
    folder = tmp_path_factory.mktemp("resumed")
    cases = {1: [(2, 0), (2, 3)], 2: [(2, 2), (3, 3)], 3: [(3, 1), (2, 3)]}
    runs = {}
    for world_size, pairs in cases.items():
        for before, after in pairs:
            name = f"{before}-{after}-{world_size}"
            runs[before, after, world_size] = prepare(folder / name, source, after, whole[before])
        run_ranks(train_all, world_size, [runs[before, after, world_size] for before, after in pairs])
    return runs


CASES = [(2, 0, 1), (2, 3, 1), (2, 2, 2), (3, 3, 2), (3, 1, 3), (2, 3, 3)]


@pytest.mark.parametrize("case", CASES)
def test_losses_go_on_as_if_nothing_had_happened(resumed: dict, whole: dict[int, Path], case: tuple) -> None:
    expected, found = losses_of(whole[case[0]]), losses_of(resumed[case])
    assert sorted(found) == list(range(SAVED_STEP + 1, NUM_STEPS + 1)), "no step is repeated and none is left out"
    assert [found[step] for step in sorted(found)] == pytest.approx(
        [expected[step] for step in sorted(found)], abs=1e-5
    )


@pytest.mark.parametrize("case", [(2, 2, 2), (3, 3, 2)])
def test_on_the_same_ranks_and_stage_the_result_is_bit_equal(resumed: dict, whole: dict, case: tuple) -> None:
    assert {step: loss for step, loss in losses_of(whole[case[0]]).items() if step > SAVED_STEP} == losses_of(
        resumed[case]
    )
    for name in (WEIGHTS, OPTIMIZER):
        files = [(run / "checkpoints" / LAST / name).read_bytes() for run in (whole[case[0]], resumed[case])]
        assert files[0] == files[1], name


def test_a_checkpoint_is_small_and_knows_its_origin(whole: dict[int, Path]) -> None:
    folder = whole[3] / "checkpoints" / LAST
    checkpoint = read_checkpoint(folder)
    lora_bytes = sum(t.nbytes for name, t in checkpoint.tensors.items() if name.startswith("weight/"))
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert total < 3 * lora_bytes + 60_000, "weights and two moments, nothing of the base"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["train"]["step"] == NUM_STEPS
    assert len(provenance["answer_ids"]) == 2
    assert provenance["base"]["fingerprint"]


def test_the_adapter_loads_with_peft(whole: dict[int, Path]) -> None:
    from peft import PeftModel

    from tests.merge.models import load

    model = PeftModel.from_pretrained(load(whole[3] / "base"), str(whole[3] / "checkpoints" / LAST / "adapter"))
    tensors = read_checkpoint(whole[3] / "checkpoints" / LAST).tensors
    name = "model.layers.1.self_attn.q_proj.lora_B.default.weight"
    assert model.get_base_model().get_parameter(name).equal(tensors[f"weight/{name}"])
    assert tensors[f"weight/{name}"].any()
