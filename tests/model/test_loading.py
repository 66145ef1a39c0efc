"""What loading a model says."""

from pathlib import Path

import pytest
import torch

from tests.merge.models import make_base
from trsr_dist import pretrained
from trsr_dist.distributed import process_group
from trsr_dist.environment import Ranks
from trsr_dist.log import setup_logging
from trsr_dist.model.loading import BaseSource, load_base_divided
from trsr_dist.pretrained import load_causal


def test_a_large_model_without_a_gpu_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for rank, limit in ((0, 100_000_000), (0, 1000), (1, 1000)):
        monkeypatch.setattr(pretrained, "TOY_PARAMETERS", limit)
        setup_logging(rank)
        load_causal(str(base))
    said = capsys.readouterr()
    assert (said.out + said.err).count("no GPU is seen") == 1


def test_rotary_frequencies_stay_in_float32_under_zero3(tmp_path: Path) -> None:
    """DeepSpeed rounds every new tensor to the weights' dtype: at position 1000 bfloat16 is off by whole radians."""
    base = make_base(tmp_path)
    with process_group(Ranks(), always=True):
        zero = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}}
        model = load_base_divided(BaseSource(str(base)), torch.bfloat16, zero)
    found = dict(model.named_buffers())
    assert found.keys() >= {"model.rotary_emb.inv_freq"}
    expected = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    for name, frequencies in found.items():
        assert frequencies.dtype == torch.float32, name
        assert torch.allclose(frequencies, expected, rtol=1e-6), name
