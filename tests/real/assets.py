"""Where real weights, tokenizers, data and a server lie, and why a test goes without them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import benchmarks.vllm
from tests.tokenizers import LLAMA_2_TEMPLATE

NAMES = ("llama2", "llama3_1", "qwen3", "gemma3", "smollm2")
REAL = [pytest.param(name, marks=pytest.mark.real) for name in NAMES]
"""For tests that made tokenizers go through as well."""
CACHE = Path.home() / ".cache" / "trsr_dist"
"""Where tools/fetch_smollm2.py and `make real-server` put things."""


def model_folder() -> Path:
    """SmolLM2-135M-Instruct in float32; skips the test where it is not there."""
    folder = Path(os.environ.get("TRSR_REAL_MODEL") or CACHE / "smollm2-135m-instruct")
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no model in {folder}: tools/fetch_smollm2.py brings it, TRSR_REAL_MODEL names another place")
    return folder


@cache
def real_tokenizer(name: str) -> Any:
    """A real tokenizer; skips the test where it is not there. SmolLM2's lies with its model too."""
    folder = Path(os.environ.get("TRSR_REAL_TOKENIZERS") or CACHE / "tokenizers") / name
    if not (folder / "tokenizer.json").is_file() and name == "smollm2":
        folder = model_folder()
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no tokenizer in {folder}: TRSR_REAL_TOKENIZERS names a folder with those of {', '.join(NAMES)}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = LLAMA_2_TEMPLATE  # Llama 2's files of that time had none
    return tokenizer


def data_settings() -> list[str]:
    """MIND where TRSR_REAL_DATA names a folder with its files, else invented news."""
    folder = Path(os.environ.get("TRSR_REAL_DATA") or "/no/such")
    if (folder / "behaviors.tsv").is_file():
        return ["data.format=mind", f"data.path={folder}"]
    return ["data.format=demo", "demo.num_users=400", "demo.num_items=300"]


def vllm_program() -> Path:
    """vLLM's command in a separate environment; skips the test where it is not there."""
    program = Path(os.environ.get("TRSR_VLLM") or CACHE / "vllm" / "bin" / "vllm")
    if not program.is_file():
        pytest.skip(f"no server at {program}: make real-server installs vLLM for CPUs, TRSR_VLLM names another place")
    return program


def has_model() -> bool:
    """Whether SmolLM2 is there, for tests that can do with a small made one."""
    try:
        model_folder()
    except pytest.skip.Exception:
        return False
    return True


@contextmanager
def vllm_server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """``benchmarks.vllm.vllm_server``'s address; skips the test where vLLM is not there."""
    with benchmarks.vllm.vllm_server(vllm_program(), model, log, *options) as server:
        yield server.address
