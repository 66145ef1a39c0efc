"""A classifier in place of the language head: one label, whose logit is the log-odds of yes.

``logit(yes) - logit(no)`` is linear in the last hidden state. So the difference of the head's two rows is the whole
head of a ``*ForSequenceClassification``, which transformers loads, and servers do with pooling endpoints.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from trsr_dist.errors import ModelError
from trsr_dist.files import read_json, write_json
from trsr_dist.prompts.builder import PromptBuilder

ARCHITECTURES = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}
"""By ``model_type``: those whose logits are the head's weight times the last hidden state, and nothing else."""
CAUSAL = "use --head causal"
PADDING = ("pad_token", "eos_token", "unk_token", "bos_token")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
PROBE = ("instruction", "summary", ("item",), "candidate")


def check_head(base: Path, config: PretrainedConfig, entries: Container[str], builder: PromptBuilder | None) -> None:
    """The log-odds must be one row times the last hidden state, and the tokenizer must end a text where a prompt ends.

    Raises:
        ModelError: the answers are not single tokens, the head is no plain weight, the architecture has no classifier
            here, or the tokenizer appends tokens to every text.
    """
    if builder is None:
        raise ModelError(
            f"{base}: --head classifier needs two answers of one token each; the adapter names none, and yes and no "
            f"are not single tokens of this tokenizer. Put the training's provenance.json beside it, or {CAUSAL}"
        )
    softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    if softcap:
        raise ModelError(
            f"{base}: config.json has final_logit_softcapping={softcap}, so that the log-odds are not linear; --head "
            f"classifier expects a head without it: {CAUSAL}"
        )
    if "lm_head.bias" in entries:
        raise ModelError(
            f"{base}: its head has a bias (lm_head.bias), which *ForSequenceClassification has not; --head "
            f"classifier expects a head without one: {CAUSAL}"
        )
    if config.model_type not in ARCHITECTURES:
        raise ModelError(
            f"{base}: model_type is {config.model_type!r}; --head classifier expects one of "
            f"{', '.join(ARCHITECTURES)}: {CAUSAL}"
        )
    text = builder.render(*PROBE)
    found = builder.tokenizer(text, add_special_tokens=builder.style == "plain")["input_ids"]
    if found != builder.encode(text):
        raise ModelError(
            f"{base}: its tokenizer appends {builder.tokenizer.decode(found[-1:])!r} to every text, behind which a "
            "classifier would read; --head classifier expects nothing there: take it out of tokenizer.json's "
            f"post_processor (and set add_eos_token=false), or {CAUSAL}"
        )


def padding_token(builder: PromptBuilder, num_embeddings: int) -> tuple[str, int]:
    """What fills up batches: the tokenizer's own token, else its end token, or the next that will do.

    Pooling reads the last token that is not padding. So padding must not be what ends a prompt.

    Returns:
        The token, empty where the tokenizer pads with it already, and its id.

    Raises:
        ModelError: there is none.
    """
    tokenizer, last = builder.tokenizer, builder.encode(builder.render(*PROBE))[-1]
    for name in PADDING:
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and number != last and number < num_embeddings:
            return "" if name == PADDING[0] else str(getattr(tokenizer, name)), number
    raise ModelError(
        f"{tokenizer.name_or_path}: none of its tokens ({', '.join(PADDING)}) can fill up a batch: each is missing, "
        f"ends the prompts or has no embedding; set pad_token in tokenizer_config.json, or {CAUSAL}"
    )


def config_values(model_type: str, builder: PromptBuilder, pad_id: int) -> dict[str, Any]:
    """What config.json of the classifier says beside the base's.

    ``multi_label_classification`` with one label is a sigmoid in transformers' pipeline and in vLLM; ``use_sep_token``
    has vLLM join query and document as they are.
    """
    label = builder.answers[0]
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "num_labels": 1,
        "id2label": {"0": label},
        "label2id": {label: 0},
        "problem_type": "multi_label_classification",
        "pad_token_id": pad_id,
        "use_sep_token": False,
    }


def write_padding(folder: Path, token: str) -> None:
    """Have the folder's tokenizer pad with ``token``."""
    for number, name in enumerate(TOKENIZER_SETTINGS):
        path = folder / name
        if path.is_file() or number == 0:
            write_json(path, (read_json(path) if path.is_file() else {}) | {"pad_token": token})
