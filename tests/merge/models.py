"""Small bases, adapters and checkpoints, made here from configs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.tokenizers import byte_level
from trsr_dist.files import read_json, sha256_of, write_json
from trsr_dist.model.artifacts import base_fingerprint
from trsr_dist.prompts.builder import PromptBuilder

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gpt2": GPT2Config,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_base(
    folder: Path, kind: str = "llama", dtype: str = "float32", tied: bool = False, shard_size: str = "60KB"
) -> Path:
    """A random model of two layers, saved in several files, with a tokenizer that has a chat template."""
    torch.manual_seed(1)
    tokenizer = byte_level(chat=True)
    config = CONFIGS[kind](
        vocab_size=len(tokenizer) + 6,  # transformers adds its own special tokens for Qwen
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def stretch(base: Path, folder: Path) -> Path:
    """A copy of a base whose rotary scaling depends on the longest prompt, so that prompts share no prefixes."""
    shutil.copytree(base, folder)
    config = read_json(folder / "config.json")
    rope = config["rope_parameters"] | {"rope_type": "dynamic", "factor": 2.0}
    write_json(folder / "config.json", config | {"rope_parameters": rope})
    return folder


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """The model as any user would load it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def make_adapter(base: Path, folder: Path, seed: int = 2, **settings: Any) -> Path:
    """A PEFT adapter with random tensors, saved by PEFT itself."""
    model = random_peft_model(base, seed, **settings)
    model.save_pretrained(folder)
    return folder


def random_peft_model(base: Path, seed: int = 2, **settings: Any) -> PeftModel:
    """Base with an adapter whose tensors, B too, are random."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(load(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data.normal_(0, 0.1, generator=generator)
        elif parameter.requires_grad:
            parameter.data.mul_(1.1)
    return model


def make_checkpoint(base: Path, folder: Path, **settings: Any) -> Path:
    """A checkpoint folder as training writes it."""
    make_adapter(base, folder / "adapter", **settings)
    builder = PromptBuilder(AutoTokenizer.from_pretrained(base))
    provenance = {
        "base": {"name_or_path": str(base), "revision": "", "fingerprint": base_fingerprint(base)},
        "prompt": builder.settings,
        "answer_ids": list(builder.answer_ids),
        "domain": "news",
        "shards": {"train": "0" * 64},
        "train": {"step": 7, "negatives_per_positive": 1, "loss": "answer"},
    }
    write_json(folder / "provenance.json", provenance)
    write_json(folder / "state.json", {"step": 7})
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the manifest again, as the last file."""
    (folder / "manifest.json").unlink(missing_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}
    write_json(folder / "manifest.json", {"files": files})


def rename_tensors(folder: Path, rename: Callable[[str], str], **more: torch.Tensor) -> None:
    """Store a model's tensors under other names, in one file, with some more."""
    tensors = {rename(name): tensor for name, tensor in tensors_of(folder).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
