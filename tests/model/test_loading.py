"""What loading a model says."""

from pathlib import Path

import pytest
import torch

from tests.merge.models import make_base
from trsr_dist import pretrained
from trsr_dist.log import setup_logging
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
