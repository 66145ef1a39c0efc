"""A small random Llama with a byte-level tokenizer: it babbles, each prompt its own way."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tokenizers import byte_level

CONTEXT = 4096


def small_model(seed: int = 0) -> LlamaForCausalLM:
    """Weights ten times as large as usual, so that its texts differ and do not end in one loop."""
    tokenizer = byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def write_model(folder: Path, chat: bool = False) -> Path:
    """The model as a folder that any library loads."""
    small_model().save_pretrained(folder)
    byte_level(chat).save_pretrained(folder)
    return folder


def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    return byte_level(chat)
