"""A byte-level BPE tokenizer, trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
PIECES = r"(?<=\p{L}) \p{L}+|\p{L}+|\p{N}+|[^\p{L}\p{N}]+"
"""Words, numbers, and what stands between them. A blank belongs to a word only behind another word, so that a topic is
the same token in ``sports/tennis (4)`` and in ``subcategory: tennis``: a small model has no time to learn that two
tokens mean the same."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Equal texts give an equal tokenizer; each encoded text begins with the begin token.

    Args:
        texts: of the corpus.
        vocab_size: at most so many tokens; fewer where the texts do not hold enough different words.
    """
    backend = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    begin = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
