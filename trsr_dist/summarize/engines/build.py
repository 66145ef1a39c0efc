"""From settings to an engine, and to what its texts depend on; libraries are imported only when chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trsr_dist.config.sections import SummarizeSection
from trsr_dist.hashing import digest
from trsr_dist.summarize.extract import EXTRACT_VERSION
from trsr_dist.summarize.requests import Engine

SMALL_FILE = 1 << 20
SAMPLED_BYTES = 1 << 16
SAMPLES = 16


def engine_identity(settings: SummarizeSection, model: str, seed: int) -> dict[str, Any]:
    """All that a text depends on beside its prompt; part of every key and of the provenance. Loads no model."""
    if settings.scheme == "none":
        return {"engine": "none"}
    if settings.engine == "extractive":
        return {"engine": "extractive", "version": EXTRACT_VERSION, "max_new_words": settings.max_new_tokens}
    sampling = {"seed": seed} if settings.temperature else {}
    return {
        "engine": settings.engine,
        "model": settings.model,
        "revision": settings.revision,
        "fingerprint": model_fingerprint(Path(model)),
        "precision": settings.precision,
        "prompt_style": settings.prompt_style,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        **sampling,
    }


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder: small files whole (config, tokenizer, template), large ones by size and samples.

    Empty where the model is no folder: a hub id with its revision, or a server's name for its model, says enough.
    """
    if not folder.is_dir():
        return ""
    files = sorted(path for path in folder.glob("*.*") if path.is_file())
    return digest([[path.name, path.stat().st_size, _content(path)] for path in files])[:32]


def _content(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as stream:
        if size <= SMALL_FILE:
            return stream.read().hex()
        pieces = []
        for number in range(SAMPLES):
            stream.seek(number * (size - SAMPLED_BYTES) // (SAMPLES - 1))
            pieces.append(stream.read(SAMPLED_BYTES).hex())
    return digest(pieces)


def build_engine(settings: SummarizeSection, model: str) -> Engine:
    """The engine that the settings ask for.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the engine's library is not installed.
    """
    if settings.engine == "extractive" or settings.scheme == "none":
        from trsr_dist.summarize.engines.extractive import ExtractiveEngine

        return ExtractiveEngine(settings.max_in_flight)
    from trsr_dist.summarize.engines.transformers import TransformersEngine

    return TransformersEngine.load(
        model,
        settings.revision,
        settings.trust_remote_code,
        settings.precision,
        settings.prompt_style,
        settings.max_prompt_tokens,
        settings.max_in_flight,
    )
