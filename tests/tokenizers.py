"""Small real tokenizers, made here: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from trsr_dist.prompts.text import WORDINGS, recommend_instruction

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING_TEMPLATE = (
    CHAT_TEMPLATE + "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
"""As Qwen3's: without the variable the model's own thoughts come first."""
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


@cache
def normalizing(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level with NFKC, whose added tokens, not marked special, are looked for in the normalized text."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    turns = ("<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>", "[Candidate]", "\u682a")
    tokenizer.add_tokens([AddedToken(turn, normalized=True, special=False) for turn in turns])
    tokenizer.chat_template = THINKING_TEMPLATE if chat else None
    return tokenizer


@cache
def sentencepiece(style: str = "llama2") -> PreTrainedTokenizerFast:
    """As converted from SentencePiece: bytes for unknown characters, a blank before the text (``llama2``), or line ends
    and blanks as added tokens (``gemma``); each with its chat template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(TEXTS[:200], trainer)
    model = json.loads(backend.to_str())["model"]
    vocabulary = list(model["vocab"]) + [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(
        models.BPE({token: n for n, token in enumerate(vocabulary)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    added: Sequence[str] = ()
    if style == "gemma":
        backend.normalizer = normalizers.Replace(" ", "\u2581")
        added = ("\n\n", "\n\n\n", "\u2581\u2581", "\u2581\u2581\u2581", "<h1>", "</h1>", "[multimodal]")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
    if style == "gemma":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = GEMMA_TEMPLATE if style == "gemma" else LLAMA_2_TEMPLATE
    return tokenizer


def with_end_token(chat: bool = False) -> PreTrainedTokenizerFast:
    """One that appends its end token to every text, as ``add_eos_token`` makes some do."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()),
        bos_token="<|bos|>",
        eos_token="<|end|>",
    )
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=ends
    )
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer
