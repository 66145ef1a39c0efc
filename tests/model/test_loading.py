"""What loading a model says."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from tests.merge.models import make_base
from trsr_dist import pretrained
from trsr_dist.errors import ConfigError
from trsr_dist.files import read_json, write_json
from trsr_dist.log import setup_logging
from trsr_dist.model.loading import load_base, open_model
from trsr_dist.pretrained import BaseSource, max_positions


def test_a_large_model_without_a_gpu_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for rank, limit in ((0, 100_000_000), (0, 1000), (1, 1000)):
        monkeypatch.setattr(pretrained, "TOY_PARAMETERS", limit)
        setup_logging(rank)
        load_base(BaseSource(str(base)), torch.float32, torch.device("cpu"))
    said = capsys.readouterr()
    assert (said.out + said.err).count("no GPU is seen") == 1


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=4096), 4096),
        (LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 4.0}), 16384),
        (
            LlamaConfig(
                max_position_embeddings=131072,
                rope_parameters=LLAMA3_ROPE | {"original_max_position_embeddings": 8192},
            ),
            131072,
        ),
        (
            Qwen2Config(
                max_position_embeddings=32768,
                rope_parameters={
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                    "rope_theta": 1e6,
                },
            ),
            131072,
        ),
        (Gemma3TextConfig(max_position_embeddings=512), 512),
        (GPT2Config(n_positions=64), 64),
        (BloomConfig(), sys.maxsize),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_of_a_model_with_its_rotary_scaling(config: PretrainedConfig, expected: int) -> None:
    assert max_positions(config) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompts_longer_than_the_models_positions_are_refused(tmp_path: Path, kind: str) -> None:
    base, key = make_base(tmp_path / "base", kind), "n_positions" if kind == "gpt2" else "max_position_embeddings"
    config = read_json(base / "config.json")
    num_positions = 1024 if kind == "gpt2" else 200  # GPT-2's are weights
    write_json(base / "config.json", config | {key: num_positions})
    open_model(str(base), "cpu", torch.float32, {"max_tokens": num_positions})
    with pytest.raises(ConfigError, match=f"has positions for {num_positions} tokens.*set prompt.max_tokens"):
        open_model(str(base), "cpu", torch.float32, {"max_tokens": num_positions + 1})
