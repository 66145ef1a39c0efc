"""A base divided over real ranks: each holds and reads its share, and together they hold the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.merge.models import make_base, stretch
from tests.spawn import run_ranks
from trsr_dist.distributed import process_group
from trsr_dist.environment import Ranks
from trsr_dist.model.loading import BaseSource, load_base_divided

ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}


def load_share(rank: int, world_size: int, folder: Path, dtype: str) -> dict[str, Any]:
    import deepspeed

    from trsr_dist.model.zero3 import load_divided
    from trsr_dist.pretrained import BaseSource, build_model, load_config

    source = BaseSource(str(folder))
    precision = {"bf16": {"enabled": dtype == "bfloat16"}}
    config = load_config(source)
    build = partial(build_model, config, source, getattr(torch, dtype))
    model, num_bytes_read = load_divided(folder, build, ZERO3 | precision)
    held = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole = {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
    return {"read": num_bytes_read, "held": held, "whole": whole}


@pytest.mark.parametrize(("world_size", "tied", "dtype"), [(2, False, "float32"), (3, True, "bfloat16")])
def test_ranks_hold_and_read_their_shares(tmp_path: Path, world_size: int, tied: bool, dtype: str) -> None:
    folder = make_base(tmp_path / "base", tied=tied)
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    num_bytes = sum(tensor.nbytes for tensor in stored.values())
    longest_row = max(tensor[0].nbytes for tensor in stored.values())
    ranks = run_ranks(load_share, world_size, folder, dtype)
    for rank in ranks:
        assert rank["whole"].keys() == stored.keys()
        for name, values in rank["whole"].items():
            assert torch.equal(torch.from_numpy(values), stored[name].to(getattr(torch, dtype)).float()), name
        size = num_bytes // 4 * torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        assert size / world_size <= rank["held"] <= size / world_size + 8 * len(stored) * world_size
    read = sum(rank["read"] for rank in ranks)
    edges = len(stored) * world_size * longest_row
    assert num_bytes <= read <= num_bytes + edges, "every byte is read once, rows at the edges of shares twice"


def open_divided(rank: int, world_size: int, folder: Path) -> str:
    from trsr_dist.errors import ConfigError
    from trsr_dist.model.loading import open_model

    try:
        open_model(str(folder), "cpu", torch.float32, {}, zero_config=ZERO3)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_model_without_shared_prefixes_is_not_divided(tmp_path: Path) -> None:
    """Each of its prompts is a separate call, and the ranks have different numbers of prompts."""
    folder = stretch(make_base(tmp_path / "base"), tmp_path / "stretched")
    for error in run_ranks(open_divided, 2, folder):
        assert "ZeRO stage 3 on 2 ranks needs shared prefixes" in error


def test_rotary_frequencies_stay_in_float32_under_zero3(tmp_path: Path) -> None:
    """DeepSpeed rounds every new tensor to the weights' dtype: at position 1000 bfloat16 is off by whole radians."""
    base = make_base(tmp_path)
    with process_group(Ranks(), always=True):
        model = load_base_divided(BaseSource(str(base)), torch.bfloat16, ZERO3 | {"bf16": {"enabled": True}})
    found = dict(model.named_buffers())
    assert found.keys() >= {"model.rotary_emb.inv_freq"}
    expected = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    for name, frequencies in found.items():
        assert frequencies.dtype == torch.float32, name
        assert torch.allclose(frequencies, expected, rtol=1e-6), name
