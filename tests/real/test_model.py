"""Training and merging SmolLM2 in float32: shared prefixes, ZeRO stages and merged weights change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from tests import spawn
from tests.merge.models import load
from tests.model.test_exactness import one_by_one
from tests.model.world import gradients
from tests.model.world import run as run_row
from tests.real.assets import model_folder, real_tokenizer
from tests.train.test_equal_losses import STAGES, train_all
from tests.train.world import losses_of, make_config
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.model.recommender import Recommender
from trsr_dist.predict import Ranker, Request
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.records import Sample
from trsr_dist.rows import pack_row

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TOLERANCE = 1e-4
ADAPTER = "adapter/adapter_model.safetensors"
PROMPT = {"max_tokens": 224, "style": "auto", "recent_items": 2, "max_candidate_tokens": 48}
TRAIN = {
    "loss": "answer",
    "learning_rate": 2e-3,
    "negatives_per_positive": 2,
    "max_steps": 3,
    "row_tokens": 448,
    "rows_per_step": 2,
    "activation_checkpointing": False,
    "timeout_seconds": 600,
    "hang_seconds": 300,
}


def log_odds(logits: torch.Tensor, answers: tuple[int, int]) -> torch.Tensor:
    return logits[:, answers[0]] - logits[:, answers[1]]


def test_shared_prefixes_equal_separate_sequences(users: list[Sample]) -> None:
    """Log-odds of all answers, and LoRA gradients, relative to the largest one."""
    torch.manual_seed(0)
    model = load(model_folder())
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.02)
    builder = PromptBuilder(real_tokenizer("smollm2"), **PROMPT)
    row = pack_row([builder.build(sample).choose(range(3)) for sample in users[:3]])
    answers = builder.answer_ids
    logits, expected = one_by_one(model, row, answers)
    model.zero_grad()
    found_logits, found = run_row(Recommender(model, answers, "cpu").train(), row)
    assert float(log_odds(logits, answers).std()) > 100 * TOLERANCE
    assert float((log_odds(found_logits, answers) - log_odds(logits, answers)).abs().max()) < TOLERANCE
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
    assert len(found) == len(gradients(model)) == 8 * 30 * (4 * 576 + 2 * 576 + 2 * 192)


@pytest.fixture(scope="module")
def trained(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Run folders of ZeRO stages 1 and 3, each trained for a few steps by two ranks."""
    folder, found = tmp_path_factory.mktemp("trained"), {}
    for name in ("zero1", "zero3"):
        found[name] = folder / name
        found[name].mkdir()
        (found[name] / "shards").symlink_to(run / "shards")
        (found[name] / "ds.json").write_text(json.dumps({"zero_optimization": STAGES[name]}))
        train = TRAIN | {"deepspeed_config": str(found[name] / "ds.json")}
        make_config(found[name], model={"name_or_path": str(model_folder())}, prompt=PROMPT, train=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spawn, "TIMEOUT_SECONDS", 1200.0)
        spawn.run_ranks(train_all, 2, list(found.values()))
    yield found


def test_stages_1_and_3_train_alike(trained: dict[str, Path]) -> None:
    """Adam divides each gradient by its own size: where one is nearly 0, its rounding counts, hence the norm."""
    losses, again = (losses_of(trained[name]) for name in ("zero1", "zero3"))
    assert len(losses) == TRAIN["max_steps"] and losses[1] > losses[3] + 0.1
    assert again == pytest.approx(losses, abs=1e-5)
    adapter, other = (load_file(checkpoint_of(folder) / ADAPTER) for folder in trained.values())
    assert adapter.keys() == other.keys()
    for part in ("lora_A", "lora_B"):
        one, two = (torch.cat([t.flatten() for n, t in found.items() if part in n]) for found in (adapter, other))
        assert float(one.norm()) > 0 and float((one - two).norm() / one.norm()) < TOLERANCE


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{TRAIN['max_steps']:06d}"


def test_the_merge_is_that_of_peft_and_ranks_as_the_adapter_does(
    trained: dict[str, Path], users: list[Sample], tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(trained["zero1"])
    merge(checkpoint, tmp_path / "merged", MergeOptions(verify="weights"))
    peft = PeftModel.from_pretrained(load(model_folder()), str(checkpoint / "adapter")).merge_and_unload()
    found = load(tmp_path / "merged").state_dict()
    assert found.keys() == peft.state_dict().keys()
    for name, tensor in peft.state_dict().items():
        assert float((found[name] - tensor).abs().max()) <= 1e-6 * float(tensor.abs().max()), name
    del peft, found
    merged, adapted, base = (scores_of(place, users[:3]) for place in (tmp_path / "merged", checkpoint, model_folder()))
    assert float((merged - adapted).abs().max()) < TOLERANCE
    assert float((merged - base).abs().max()) > 100 * TOLERANCE, "and the adapter does something"


def scores_of(place: Path, users: list[Sample]) -> torch.Tensor:
    """Log-odds of candidates, under the training's prompts."""
    ranker = Ranker.open(str(place), device="cpu", precision="float32")
    ranker.builder = PromptBuilder(ranker.builder.tokenizer, **PROMPT)
    scores = []
    for sample in users:
        request = Request(tuple(c.text for c in sample.candidates), sample.recent, sample.summary)
        ranked = sorted(ranker.rank(request).candidates, key=lambda entry: entry.index)
        scores += [entry.score for entry in ranked]
    return torch.tensor(scores)
