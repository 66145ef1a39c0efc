"""The names that a base's tensors have in the model that transformers builds from it."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trsr_dist.errors import ModelError


@dataclass(frozen=True, slots=True)
class Structure:
    """Names in the model, which are those of the adapter."""

    parameters: frozenset[str]
    """Tied ones included."""
    tied: dict[str, str]
    """Tensors that share another's weights, with the other's name, such as lm_head and embed_tokens."""
    prefix: str
    """Of all but the head, such as ``transformer.``; a base that was saved without its head stores names without it."""

    def stored(self, name: str, entries: Container[str]) -> str:
        """The name under which a base with these ``entries`` stores a tensor of the model."""
        short = name.removeprefix(self.prefix)
        return short if name not in entries and short in entries else name


def read_structure(base: Path) -> Structure:
    """Build the model of a folder without its weights.

    Raises:
        ModelError: transformers does not know this architecture without code from elsewhere.
    """
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: transformers cannot build this model ({str(error).splitlines()[0]})") from None
    names = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    return Structure(names, dict(model.all_tied_weights_keys), f"{model.base_model_prefix}.")
