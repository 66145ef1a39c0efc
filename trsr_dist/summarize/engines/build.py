"""From settings to an engine, and to what its texts depend on; libraries are imported only when chosen."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from trsr_dist.config.sections import SummarizeSection
from trsr_dist.environment import show_one_gpu
from trsr_dist.errors import ModelError
from trsr_dist.files import read_json, write_json
from trsr_dist.hashing import digest
from trsr_dist.log import get_logger
from trsr_dist.prompts.encoder import Encoder
from trsr_dist.summarize.extract import EXTRACT_VERSION, ExtractiveEngine
from trsr_dist.summarize.plans.graph import RAW_VERSION
from trsr_dist.summarize.requests import Engine, EngineSettings

log = get_logger("summarize")
SMALL_FILE = 1 << 20
SAMPLED_BYTES = 1 << 16
SAMPLES = 16
TENSOR_BYTES = 4096
"""Of each tensor: a merged adapter changes few of them, and neither config nor size."""
COMMIT = re.compile("[0-9a-f]{40}")


def engine_identity(settings: SummarizeSection, model: str, seed: int, records: Path) -> dict[str, Any]:
    """All that a text depends on beside its prompt; part of every key and of the provenance. Loads no model.

    Args:
        settings: of the summarizer.
        model: folder, hub id, or the server's name.
        seed: of the sampling.
        records: where the run keeps the commit of a hub model, see ``recorded_commit``.

    Raises:
        ModelError: a hub model's commit cannot be found out.
    """
    if settings.scheme == "none":
        return {"engine": "none"}
    if settings.scheme == "raw":
        return {"engine": "none", "version": RAW_VERSION, "max_words": settings.max_new_tokens}
    if settings.engine == "extractive":
        return {"engine": "extractive", "version": EXTRACT_VERSION, "max_new_words": settings.max_new_tokens}
    template = {} if settings.prompt_style == "plain" else {"chat_template_kwargs": settings.chat_template_kwargs}
    sampling = {"seed": seed} if settings.temperature else {}
    return {
        "engine": settings.engine,
        "model": settings.model,
        "revision": settings.revision,
        "fingerprint": model_fingerprint(Path(model)) or recorded_commit(settings, records),
        "precision": settings.precision,
        "prompt_style": settings.prompt_style,
        **template,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        **sampling,
    }


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder: small files whole (config, tokenizer, template), large ones by size and samples, weights
    by a sample of each tensor too.

    Empty where the model is no folder.
    """
    if not folder.is_dir():
        return ""
    facts = []
    for path in sorted(path for path in folder.glob("*.*") if path.is_file()):
        size = path.stat().st_size
        with open(path, "rb") as stream:
            if size <= SMALL_FILE:
                content = stream.read().hex()
            else:
                even = [number * (size - SAMPLED_BYTES) // (SAMPLES - 1) for number in range(SAMPLES)]
                pieces = []
                for start, length in (
                    *((start, SAMPLED_BYTES) for start in even),
                    *((start, TENSOR_BYTES) for start in tensor_starts(path)),
                ):
                    stream.seek(start)
                    pieces.append(stream.read(length).hex())
                content = digest(pieces)
        facts.append([path.name, size, content])
    return digest(facts)[:32]


def tensor_starts(path: Path) -> list[int]:
    """Byte offsets of the tensors of a safetensors file; of any other, and of one that loading will refuse, none."""
    if path.suffix != ".safetensors":
        return []
    from trsr_dist.weights import file_entries  # loads torch

    try:
        return [entry.start for entry in file_entries(path)]
    except ModelError:
        return []


def recorded_commit(settings: SummarizeSection, records: Path) -> str:
    """The commit of a hub model as the run found it first: a branch that moves on must not change all keys between two
    starts of one job.

    Raises:
        ModelError: neither the run, the hub nor its local cache knows it.
    """
    path = records / f"commit-{digest([settings.model, settings.revision])[:12]}.json"
    if path.is_file():
        return read_json(path, dict[str, str])["commit"]
    commit = hub_commit(settings)
    if commit:
        write_json(path, {"model": settings.model, "revision": settings.revision, "commit": commit})
    return commit


def revision_to_load(settings: SummarizeSection, identity: dict[str, Any]) -> str:
    """The hub model's commit; empty or the setting's for all that is no hub model."""
    fingerprint = identity.get("fingerprint", "")
    return fingerprint if COMMIT.fullmatch(fingerprint) else settings.revision


def hub_commit(settings: SummarizeSection) -> str:
    """The commit that a hub model's revision stands for, from the hub or its local cache; empty for a server's model.

    Raises:
        ModelError: neither knows it.
    """
    if settings.engine == "openai":
        return ""
    if COMMIT.fullmatch(settings.revision):
        return settings.revision
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(settings.model, "config.json", revision=settings.revision or None)).parent.name
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"summarize.model={settings.model!r}: neither a folder nor a model that the hub or its cache gives "
            f"({str(error).splitlines()[0]})"
        ) from None


def build_engine(settings: SummarizeSection, model: str, revision: str, local_rank: int) -> Engine:
    """The engine that the settings ask for.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: the engine's library is not installed, or no server is named.
    """
    if not settings.asks_model:
        return ExtractiveEngine(settings.max_in_flight)
    if settings.engine == "openai":
        from trsr_dist.summarize.engines.openai import OpenAIEngine

        return OpenAIEngine(engine_settings(settings), server_encoder(model, settings.revision))
    asked = engine_settings(settings, model=model, revision=revision)
    if settings.engine == "vllm":
        show_one_gpu(local_rank)
        from trsr_dist.summarize.engines.vllm import VllmEngine

        return VllmEngine.load(asked)
    from trsr_dist.summarize.engines.transformers import TransformersEngine

    return TransformersEngine.load(asked, local_rank)


def engine_settings(settings: SummarizeSection, **found: str) -> EngineSettings:
    """Those of an engine, with what was ``found`` of its model in place of what the config says."""
    return EngineSettings(**{field.name: getattr(settings, field.name) for field in fields(EngineSettings)} | found)


def server_encoder(model: str, revision: str) -> Encoder | None:
    """An encoder with the tokenizer of a server's model; None where the model's name is neither a folder with one nor a
    hub id in the local cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(model)
    if not folder.is_dir():
        try:
            found = try_to_load_from_cache(model, "tokenizer_config.json", revision=revision or None)
        except HFValidationError:
            return None
        folder = Path(found).parent if isinstance(found, str) else folder
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from trsr_dist.pretrained import BaseSource, load_tokenizer

    try:
        return Encoder(load_tokenizer(BaseSource(str(folder))), "plain")
    except ModelError as error:
        log.warning("%s; what reads like a control token is taken apart in the texts that the server gets", error)
        return None
