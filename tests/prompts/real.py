"""Real tokenizers, where they were fetched: folders below ``TRSR_REAL_TOKENIZERS``."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.tokenizers import LLAMA_2_TEMPLATE

NAMES = ("llama2", "llama3_1", "qwen3", "gemma3", "smollm2")


@cache
def real_tokenizer(name: str) -> Any:
    """One of them; skips the test where it is not there."""
    folder = Path(os.environ.get("TRSR_REAL_TOKENIZERS", "/no/such")) / name
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(
            f"no {name} below TRSR_REAL_TOKENIZERS: set it to a folder with tokenizer.json of {', '.join(NAMES)}"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        tokenizer.chat_template = LLAMA_2_TEMPLATE  # Llama 2's files of that time had none
    return tokenizer
