"""One folder, one model: whether the head is tied is what the files hold, whole, divided, merged and predicted."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from tests.merge.models import load, make_adapter, make_base, tensors_of
from tests.spawn import run_ranks
from trsr_dist.config import Config
from trsr_dist.errors import TrsrError
from trsr_dist.files import read_json, write_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.planner.job import Inputs
from trsr_dist.planner.shape import ModelShape
from trsr_dist.predict import Ranker, Request

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
CASES = {"tied": True, "untied": False, "equal": True, "false-tied": False}
"""Whether the head is the embedding."""
DIVIDED = ("base", "tuned")
REQUEST = Request(tuple(f"title: number {number}" for number in range(5)), ("title: tea", "title: cups"))


def store(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], tied: bool) -> Path:
    """Change a base's tensors, and what its config says of the head."""
    tensors = tensors_of(folder)
    edit(tensors)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", read_json(folder / "config.json") | {"tie_word_embeddings": tied})
    return folder


def make_case(folder: Path, name: str) -> Path:
    base = make_base(folder, tied=name in ("tied", "equal"))
    if name == "equal":
        return store(base, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}), tied=True)
    return store(base, lambda _: None, tied=True) if name == "false-tied" else base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each base with its own adapter, and both merged."""
    folder = tmp_path_factory.mktemp("ties")
    for name in CASES:
        base = make_case(folder / name / "base", name)
        make_adapter(base, folder / name / "tuned")
        merge(folder / name / "tuned", folder / name / "merged", MergeOptions(verify="weights"))
    return folder


def predicted(place: Path) -> list[float]:
    ranking = Ranker.open(str(place), device="cpu").rank(REQUEST)
    return [entry.score for entry in sorted(ranking.candidates, key=lambda entry: entry.index)]


def by_transformers(base: Path, adapter: Path | None) -> list[float]:
    """As anyone would compute them: each prompt alone."""
    ranker = Ranker.open(str(base), device="cpu")
    model = load(base) if adapter is None else PeftModel.from_pretrained(load(base), adapter)
    scores = []
    user = ranker.builder.build(ranker.sample(REQUEST))
    for suffix in user.suffixes:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*user.prefix, *suffix]])).logits[0, -1]
        yes, no = ranker.builder.answer_ids
        scores.append(float(logits[yes] - logits[no]))
    return scores


def divided(rank: int, world_size: int, folder: Path) -> dict[str, list[float]]:
    """Scores of bases and adapters whose weights lie divided over the ranks."""
    from trsr_dist.config.sections import PromptSection
    from trsr_dist.model.loading import open_model

    found = {}
    for name in (f"{name}/{kind}" for name in CASES for kind in DIVIDED):
        opened = open_model(str(folder / name), "cpu", torch.float32, PromptSection().model_dump(), zero_config=ZERO3)
        ranking = Ranker(opened).rank(REQUEST)
        found[name] = [entry.score for entry in sorted(ranking.candidates, key=lambda entry: entry.index)]
    return found


def test_the_same_folder_gives_the_same_scores_in_all_ways(folder: Path) -> None:
    together = run_ranks(divided, 2, folder)
    for name in CASES:
        base, adapter, merged = (folder / name / kind for kind in ("base", "tuned", "merged"))
        before, after = by_transformers(base, None), by_transformers(base, adapter)
        assert np.abs(np.subtract(before, after)).max() > 1e-2, "the adapter changes something"
        ways = {"base": before, "tuned": after, "merged": after}
        for kind, expected in ways.items():
            assert predicted(folder / name / kind) == pytest.approx(expected, abs=1e-4), (name, kind)
            for rank in together if kind in DIVIDED else ():
                assert rank[f"{name}/{kind}"] == pytest.approx(expected, abs=1e-4), (name, kind, "divided")
        assert by_transformers(merged, None) == pytest.approx(after, abs=1e-4), name


def test_a_false_flag_changes_the_scores_and_is_corrected_by_a_merge(folder: Path) -> None:
    """Else the test above could not fail."""
    case = folder / "false-tied"
    assert read_json(case / "base" / "config.json")["tie_word_embeddings"] is True
    assert read_json(case / "merged" / "config.json")["tie_word_embeddings"] is False
    tied = shutil.copytree(case / "base", case / "really-tied")
    store(tied, lambda tensors: tensors.pop(HEAD), tied=True)
    assert np.abs(np.subtract(by_transformers(tied, None), by_transformers(case / "base", None))).max() > 1e-2


def planned_shape(base: Path) -> ModelShape:
    config = {"data": {"format": "demo"}, "model": {"name_or_path": str(base)}}
    return Inputs(Config.model_validate(config), "float32").shape


def test_the_planner_counts_the_head_that_is_stored(folder: Path) -> None:
    sizes = {name: planned_shape(folder / name / "base") for name in CASES}
    assert {name: shape.tied_embeddings for name, shape in sizes.items()} == CASES
    embedding = sizes["tied"].vocab_size * sizes["tied"].hidden_size
    assert sizes["false-tied"].num_parameters == sizes["tied"].num_parameters + embedding


def refusals(rank: int, world_size: int, base: Path) -> str:
    from trsr_dist.model.loading import open_model

    try:
        open_model(str(base), "cpu", torch.float32, {}, zero_config=ZERO3)
    except TrsrError as error:
        return str(error)
    return ""


def test_a_head_that_is_nowhere_is_missed_in_all_ways(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base, tmp_path / "tuned")
    write_json(base / "config.json", read_json(base / "config.json") | {"tie_word_embeddings": False})
    message = r"1 are missing, the first is lm_head\.weight\); .*tie_word_embeddings=true"
    for act in (
        lambda: Ranker.open(str(base), device="cpu"),
        lambda: Ranker.open(str(adapter), device="cpu"),
        lambda: merge(adapter, tmp_path / "merged", MergeOptions(verify="weights")),
        lambda: planned_shape(base),
    ):
        with pytest.raises(TrsrError, match=message):
            act()
    assert "tie_word_embeddings=true" in run_ranks(refusals, 1, base)[0]
