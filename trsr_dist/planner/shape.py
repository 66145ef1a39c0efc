"""The sizes of a decoder-only transformer, read from its Hugging Face config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trsr_dist.errors import ModelError

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Llama's layout: grouped-query attention and a gated MLP. Qwen2, Qwen3 and Mistral share it."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """From the content of a model's ``config.json``.

        Raises:
            ModelError: a size that is needed does not stand in it.
        """
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        for key in needed:
            if not isinstance(config.get(key), int):
                kind = config.get("model_type", "unknown")
                raise ModelError(f"model config ({kind}): {key} is {config.get(key)!r}, expected a whole number")
        heads = config["num_attention_heads"]
        return cls(
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=bool(config.get("tie_word_embeddings")),
            qkv_bias=bool(config.get("attention_bias") or config.get("model_type") == "qwen2"),
            qk_norm=config.get("model_type") == "qwen3",
        )

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output width of each linear module of one layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def num_linear_parameters(self) -> int:
        """Weights that every token is multiplied with, over all layers; biases and the output head not counted."""
        return self.num_layers * sum(rows * columns for rows, columns in self.linears.values())

    @property
    def num_layer_parameters(self) -> int:
        """Parameters of one layer, norms and biases included."""
        biases = sum(self.linears[name][1] for name in ("q_proj", "k_proj", "v_proj")) if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return self.num_linear_parameters // self.num_layers + biases + norms

    @property
    def num_parameters(self) -> int:
        """All parameters of the base model."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * self.num_layer_parameters + embeddings + self.hidden_size

    def num_lora_parameters(self, r: int, target_modules: Iterable[str] | str) -> int:
        """Trainable parameters of a LoRA adapter of rank ``r``.

        Raises:
            ModelError: a target is not a linear module of this layout.
        """
        names = tuple(self.linears) if target_modules == "all-linear" else tuple(target_modules)
        unknown = sorted(set(names) - self.linears.keys())
        if unknown:
            raise ModelError(f"lora.target_modules: {unknown[0]!r} is none of {', '.join(self.linears)}")
        return self.num_layers * sum(r * sum(self.linears[name]) for name in names)
