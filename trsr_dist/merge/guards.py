"""Checks before anything is written: the output's place, the base, the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from trsr_dist.errors import ModelError, RunError, TrsrError
from trsr_dist.files import read_json
from trsr_dist.log import get_logger
from trsr_dist.pretrained import BaseSource, load_tokenizer
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import MANIFEST

logger = get_logger("merge")
STAGE = "merge"
SPARE_BYTES = 2**26
"""Room for everything beside the weights."""


def check_output(output: Path, inputs: list[Path], force: bool) -> None:
    """The output must be new, empty, or an earlier merge.

    Raises:
        RunError: it holds other files, or is one of the inputs.
    """
    for path in inputs:
        if output.resolve() == path.resolve() or output.resolve() in path.resolve().parents:
            raise RunError(f"{output}: is or holds the input {path}; choose another --output")
    if output.exists() and not output.is_dir():
        raise RunError(f"{output}: a file; choose another --output")
    if force and output.is_dir() and any(output.iterdir()):
        manifest = output / MANIFEST
        if not manifest.is_file() or read_json(manifest).get("stage") != STAGE:
            raise RunError(
                f"{output}: holds files that are no earlier merge, and only such a one is replaced. Empty it first"
            )


def check_space(output: Path, num_bytes: int) -> None:
    """The old output stays until the new one is whole, so that both must fit.

    Raises:
        RunError: too little room on the output's file system.
    """
    parent = next(path for path in [output.absolute(), *output.absolute().parents] if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < num_bytes + SPARE_BYTES:
        raise RunError(
            f"{output}: needs {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB beside what is there, {free / 1e9:.2f} GB are "
            "free; make room or choose another --output"
        )


def resolve_prompt(folder: Path, own: bool, num_embeddings: int, provenance: dict[str, Any]) -> PromptBuilder | None:
    """The prompt builder of the training, checked against this tokenizer; None where answers cannot be resolved.

    Args:
        folder: holds the tokenizer.
        own: it is the base's own folder.

    Raises:
        ModelError: the tokenizer is not that of the training, or does not fit the model.
    """
    tokenizer = load_tokenizer(BaseSource(str(folder)))
    largest = max(tokenizer.get_vocab().values())
    if largest >= num_embeddings:
        message = f"{folder}: the tokenizer's largest id is {largest}, the model has {num_embeddings} embeddings"
        if not own:
            raise ModelError(f"{message}: the tokenizer of another model; restore the right one")
        logger.warning(f"{message}; a text with such an id will fail")
    if "prompt" not in provenance:
        return _default_prompt(tokenizer)
    builder = PromptBuilder(tokenizer, **provenance["prompt"])
    if list(builder.answer_ids) != list(provenance["answer_ids"]):
        raise ModelError(
            f"{folder}: answers {builder.answers} are tokens {list(builder.answer_ids)}, in training "
            f"{list(provenance['answer_ids'])}: another tokenizer; restore the base's"
        )
    return builder


def _default_prompt(tokenizer: Any) -> PromptBuilder | None:
    try:
        return PromptBuilder(tokenizer)
    except TrsrError:
        return None
