"""Everything a server needs beside the weights: config, generation config, tokenizer, chat template, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from trsr_dist.bases import ADAPTER_CONFIG
from trsr_dist.files import read_json
from trsr_dist.model.places import PROVENANCE
from trsr_dist.run import MANIFEST

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
LEGAL = ("LICENSE", "NOTICE", "USE_POLICY", "COPYING")
LEFT_OUT = {MANIFEST, PROVENANCE, ADAPTER_CONFIG, "trainer_state.json", "README.md"}
TOKENIZER = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "spiece", "sentencepiece")
TEMPLATES = "additional_chat_templates"
"""Folder in which transformers keeps further chat templates."""


def copy_companions(base: Path, tokenizer: Path, output: Path) -> list[str]:
    """Copy the base's files that are no weights; the tokenizer's from ``tokenizer``.

    Returns:
        Names of the copied files, sorted.
    """
    files = {path.name: path for path in base.iterdir() if is_companion(path) and not is_tokenizer_file(path)}
    files |= {path.name: path for path in tokenizer.iterdir() if is_companion(path) and is_tokenizer_file(path)}
    for name, path in files.items():
        shutil.copyfile(path, output / name)
    if (tokenizer / TEMPLATES).is_dir():
        shutil.copytree(tokenizer / TEMPLATES, output / TEMPLATES)
    return sorted(files)


def is_companion(path: Path) -> bool:
    """Whether a file of a model folder goes along with the weights."""
    if not path.is_file() or path.name in LEFT_OUT or path.name.startswith(".") or path.name.endswith(".index.json"):
        return False
    return path.suffix in SUFFIXES or path.name.upper().startswith(LEGAL)


def is_tokenizer_file(path: Path) -> bool:
    """Whether a file belongs to the tokenizer."""
    return path.name.startswith(TOKENIZER)


def adapt_config(output: Path, unties: bool, dtype: torch.dtype | None) -> None:
    """Write into config.json what the merge changed; left byte for byte where it changed nothing."""
    path = output / "config.json"
    config = read_json(path, finite=False)
    before = json.dumps(config)
    for section in _sections(config):
        if unties and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
        if dtype is not None:
            for key in ("dtype", "torch_dtype"):
                if key in section or (section is config and key == "dtype" and "torch_dtype" not in section):
                    section[key] = str(dtype).removeprefix("torch.")
    if json.dumps(config) != before:
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    nested = config.get("text_config")
    return [config, nested] if isinstance(nested, dict) else [config]
