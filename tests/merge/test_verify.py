"""The read-back finds a single wrong value."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.merge.models import make_adapter, make_base
from trsr_dist.errors import ModelError
from trsr_dist.merge import verify
from trsr_dist.merge.changes import find_changes
from trsr_dist.merge.output import write_weights
from trsr_dist.merge.plan import MergePlan, make_plan
from trsr_dist.merge.scores import compare
from trsr_dist.merge.verify import check_weights
from trsr_dist.model.adapters import read_adapter
from trsr_dist.pretrained import BaseSource, load_config, read_structure
from trsr_dist.weights import file_entries, folder_entries


def write(tmp_path: Path, dtype: str) -> tuple[Path, MergePlan]:
    base = make_base(tmp_path / "base", dtype=dtype)
    adapter = read_adapter(make_adapter(base, tmp_path / "adapter"))
    source = BaseSource(str(base))
    tied = read_structure(source, load_config(source)).tied
    plan = make_plan(folder_entries(base), find_changes(adapter), tied, False, None, None)
    output = tmp_path / "merged"
    output.mkdir()
    write_weights(output, plan)
    return output, plan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_weight_is_found(dtype: str, tmp_path: Path) -> None:
    output, plan = write(tmp_path, dtype)
    figures = check_weights(output, plan)
    assert figures.num_changed == 8 and figures.num_copied == len(plan.outputs) - 8
    assert figures.largest_relative <= (1e-6 if dtype == "float32" else 2**-8)
    name = "model.layers.1.self_attn.k_proj.weight"
    entry = next(e for path in output.glob("*.safetensors") for e in file_entries(path) if e.name == name)
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.start + 5 * entry.row_bytes)
        stream.write(torch.tensor([0.5], dtype=entry.dtype).view(torch.uint8).numpy().tobytes())
    with pytest.raises(ModelError, match=f"row 5 of {name}"):
        check_weights(output, plan)


def test_a_truncated_output_is_found(tmp_path: Path) -> None:
    output, plan = write(tmp_path, "bfloat16")
    path = output / plan.file_names[-1]
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(ModelError, match="truncated"):
        check_weights(output, plan)


def test_rank_flips_are_pairs_in_another_order() -> None:
    before, after = [torch.tensor([1.0, 2.0, 3.0])], [torch.tensor([1.0, 2.6, 2.5])]
    result = compare(before, after, 1.0, "float32", "cpu", "test")
    assert (result.num_pairs, result.rank_flips) == (3, 1)
    assert result.largest_difference == pytest.approx(0.6) and result.mean_difference == pytest.approx(1.1 / 3)
    with pytest.raises(ModelError, match=r"differ by up to 0\.6"):
        compare(before, after, 0.5, "float32", "cpu", "test")
    with pytest.raises(ModelError, match="differ by up to nan"):
        compare(before, [torch.tensor([1.0, 2.0, float("nan")])], 0.5, "float32", "cpu", "test")


def test_a_bar_counts_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, plan = write(tmp_path, "float32")
    words, updates = [], []

    @contextmanager
    def bar(**given: object) -> Iterator[SimpleNamespace]:
        words.append(given)
        yield SimpleNamespace(update=lambda: updates.append(1))

    monkeypatch.setattr(verify, "progress", bar)
    check_weights(output, plan)
    assert words == [{"total": len(plan.outputs), "description": "verify", "unit": "tensor"}]
    assert len(updates) == len(plan.outputs)
