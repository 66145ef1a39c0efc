"""Small real tokenizers, made here: nothing is downloaded."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trsr_dist.prompts.wording import WORDINGS, recommend_instruction

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXTS = [recommend_instruction(domain) for domain in WORDINGS] * 20 + [
    "Answer: yes",
    "Answer: no",
    "\nyes",
    "\nno",
    "[Preference Summary] [Recent Items] [Candidate]",
    "category: sports; subcategory: tennis; title: A quiet final in the rain",
    "category: finance; subcategory: markets; title: Stocks rise for a third day",
] * 20


@cache
def byte_level(chat: bool = False, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (as GPT-2, Llama 3 and Qwen have), with a chat template where asked for."""
    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def word_level(words: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows only these words; all others are unknown."""
    vocabulary = {word: number for number, word in enumerate(("<unk>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
