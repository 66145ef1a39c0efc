"""Bases in the shape of real models, written without a model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.tokenizers import byte_level
from trsr_dist.files import write_json
from trsr_dist.merge.tensors import INDEX, header_bytes

Shapes = dict[str, tuple[int, ...]]
SHARD_BYTES = 5 * 10**9
LLAMA2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
SMALL = LLAMA2_7B | {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4, "num_attention_heads": 8}
SMALL |= {"num_key_value_heads": 8}


def llama_shapes(config: LlamaConfig) -> Shapes:
    """Names and shapes of a Llama model's tensors, in their usual order."""
    hidden, middle = config.hidden_size, config.intermediate_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (middle, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, middle)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def write_base(folder: Path, sizes: dict[str, int]) -> Path:
    """A sharded bf16 base with plausible values, a config and a tokenizer."""
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    block = noise.view(torch.uint8).numpy().tobytes()
    shards = _shards(llama_shapes(config))
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for name, shapes in zip(names, shards, strict=True):
        with open(folder / name, "wb") as stream:
            stream.write(header_bytes([(tensor, "BF16", shape) for tensor, shape in shapes.items()]))
            rest = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
            for _ in range(0, rest, len(block)):
                stream.write(block[: min(rest, len(block))])
                rest -= len(block)
    places = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    return folder


def _shards(shapes: Shapes) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if size + num_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    return shards


def write_adapter(folder: Path, base: Path, rank: int = 8) -> Path:
    """An adapter on the attention's four projections."""
    targets = [f"{name}_proj" for name in "qkvo"]
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in llama_shapes(LlamaConfig(**json.loads((base / "config.json").read_text()))).items():
        if name.removesuffix(".weight").endswith(tuple(targets)) and "self_attn" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
