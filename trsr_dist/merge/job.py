"""Merge one checkpoint into one Hugging Face folder, or say why not."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from trsr_dist.bases import CONFIG, base_folder
from trsr_dist.environment import available_memory_bytes
from trsr_dist.errors import ConfigError, ModelError, RunError
from trsr_dist.files import atomic_folder, read_json, write_json, writing
from trsr_dist.hashing import digest
from trsr_dist.locks import FolderLock, folder_lock
from trsr_dist.log import get_logger
from trsr_dist.merge.card import find_evaluation, model_card
from trsr_dist.merge.changes import adapter_facts, adapter_hash, write_adapter
from trsr_dist.merge.classifier import write_padding
from trsr_dist.merge.inputs import DTYPES, STAGE, Inputs, MergeOptions, check_output, check_space, prepare
from trsr_dist.merge.output import adapt_config, copy_other_files, write_weights
from trsr_dist.merge.scores import (
    ACTIVATION_BYTES,
    NUM_SAMPLES,
    check_scores,
    sample_users,
    users_to_compare,
)
from trsr_dist.merge.source import base_of, find_source
from trsr_dist.merge.verify import check_weights
from trsr_dist.model.artifacts import PROVENANCE, base_fingerprint, read_provenance
from trsr_dist.run import is_finished, write_manifest

logger = get_logger("merge")


def merge(checkpoint: Path, output: Path, options: MergeOptions) -> None:
    """Merge ``checkpoint`` into ``output``; a finished merge with the same inputs and settings is left alone.

    Raises:
        TrsrError: an input is damaged or does not fit, the result is not equal, or there is no room. Nothing is left
            behind then, and an older output stays.
    """
    if options.adapter_only and options.of_weights:
        raise ConfigError(f"--adapter-only writes no merged weights; leave it out, or {options.of_weights}")
    source = find_source(checkpoint)
    if source.kind == "merged":
        if asked := options.of_weights or options.adapter_only * "--adapter-only":
            made_from = source.provenance["merge"].get("source", "its checkpoint")
            raise ConfigError(
                f"{source.folder}: a merged model, which holds no adapter, so that {asked} cannot be followed; name "
                f"with --checkpoint what it was made from ({made_from})"
            )
        logger.info(f"{source.folder}: already a merged model; nothing to do")
        return
    adapter = source.read()
    base_name = base_of(source, adapter, options.base)
    base = base_folder(base_name, source.run, "name the base's folder with --base")
    fingerprint = base_fingerprint(base)
    check_output(output, [source.folder, base], options.force or options.update)
    if options.dry_run:
        prepared = prepare(source, adapter, base_name, base, fingerprint, options)
        logger.info(f"would write {_num_bytes(prepared, options) / 1e6:,.1f} MB of weights to {output}")
        return
    settings = {"dtype": options.dtype, "max_shard_bytes": options.max_shard_size, "only": options.adapter_only}
    settings |= {"head": options.head} if options.head != "causal" else {}  # merges of before have no such key
    hashes = {"adapter": adapter_hash(adapter), "base": fingerprint}
    with writing(output), folder_lock(output) as lock:
        if _is_current(output, settings, hashes, options):
            logger.info(f"{output}: merged already, with the same inputs and settings; nothing to do")
            return
        prepared = prepare(source, adapter, base_name, base, fingerprint, options)
        _write(output, prepared, options, settings, hashes, lock)
    logger.info(f"wrote {output}")


def _is_current(output: Path, settings: dict[str, Any], hashes: dict[str, str], options: MergeOptions) -> bool:
    """Whether ``output`` is this very merge, and has passed the checks that are asked for.

    Raises:
        RunError: it is another one, or has not, and neither ``force`` nor ``update`` is set.
    """
    try:
        if not is_finished(output, settings, hashes, options.force):
            return False
        _check_verified(output, options)
        return True
    except RunError as error:
        if options.update:
            logger.info(f"{output}: of another checkpoint, other settings or fewer checks; made again")
            return False
        raise RunError(f"{error} (--update does so only where something has changed)") from None


def _check_verified(output: Path, options: MergeOptions) -> None:
    """``auto`` asks for the weights at least.

    Raises:
        RunError: the merge was published without a check that is asked for, or within a larger tolerance.
    """
    asked = {"none": "", "auto": "weights"}.get(options.verify, options.verify)
    if options.adapter_only or not asked:
        return
    found = read_provenance(output).get("merge", {}).get("verification", {})
    if not isinstance(found.get(asked), dict):
        raise RunError(
            f"{output}: its {asked} were not compared when it was made, which --verify {options.verify} asks for; "
            "--force makes it again"
        )
    largest = found["scores"]["largest_difference"] if isinstance(found.get("scores"), dict) else 0.0
    if options.tolerance is not None and largest > options.tolerance:
        raise RunError(
            f"{output}: its scores differ by up to {largest:.3g}, allowed is --tolerance {options.tolerance:g}; "
            "--force makes it again"
        )


def _num_bytes(inputs: Inputs, options: MergeOptions) -> int:
    """Of the weights to be written."""
    return inputs.adapter.num_bytes if options.adapter_only else inputs.plan.num_bytes


def _write(
    output: Path,
    inputs: Inputs,
    options: MergeOptions,
    settings: dict[str, Any],
    hashes: dict[str, str],
    lock: FolderLock,
) -> None:
    check_space(output, _num_bytes(inputs, options))
    provenance, run = make_provenance(inputs, options, hashes["adapter"]), inputs.source.run
    metrics = find_evaluation(run, provenance) if run is not None else None
    with atomic_folder(output, lock.check) as folder:
        if options.adapter_only:
            write_adapter(inputs.adapter, folder, inputs.base_name.name_or_path)
        else:
            copy_other_files(inputs.base, inputs.tokenizer, folder)
            adapt_config(folder, inputs.plan.unties, DTYPES.get(options.dtype), inputs.config_values)
            if inputs.padding:
                write_padding(folder, inputs.padding)
            write_weights(folder, inputs.plan)
            provenance["merge"]["verification"] = verify(folder, inputs, options)
        (folder / "README.md").write_text(model_card(provenance, metrics), encoding="utf-8")
        write_json(folder / PROVENANCE, provenance)
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        write_manifest(folder, STAGE, settings, hashes, files=files)


def make_provenance(inputs: Inputs, options: MergeOptions, adapter_hash: str) -> dict[str, Any]:
    """The checkpoint's provenance with the base and the facts of this merge.

    A prompt that the source does not record is left to whoever uses the model. Only a classifier is made of answers.
    """
    recorded, builder = inputs.source.provenance, inputs.builder
    base = {
        "name_or_path": inputs.base_name.name_or_path,
        "revision": inputs.base_name.revision,
        "fingerprint": inputs.fingerprint,
    }
    is_fixed = options.head == "classifier" and not recorded.get("prompt")
    prompt = {"prompt": builder.settings, "answer_ids": list(builder.answer_ids)} if is_fixed else {}
    facts = {
        "source": f"{inputs.source.kind} {inputs.source.folder.name}",
        "adapter_only": options.adapter_only,
        "head": options.head,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "untied_embeddings": inputs.plan.unties,
        "changed_tensors": sum(output.change is not None for output in inputs.plan.outputs),
        "config_hash": digest(read_json(inputs.base / CONFIG, finite=False)),
        "adapter": adapter_facts(inputs.adapter),
        "adapter_hash": adapter_hash,
    }
    return {**recorded, "base": base, **prompt, "merge": facts}


def verify(folder: Path, inputs: Inputs, options: MergeOptions) -> dict[str, Any]:
    """Read the weights back; compare scores too where asked for or where memory allows.

    Raises:
        ModelError: the merged model is not the base with its adapter, or scores were asked for and cannot be had.
    """
    if options.verify == "none":
        logger.warning("nothing is verified, as asked (--verify none)")
        return {}
    weights = check_weights(folder, inputs.plan)
    logger.info(
        f"read back: {weights.num_changed} changed tensors equal base + adapter to {weights.largest_relative:.2g} of "
        f"their rows' largest value; {weights.num_copied} tensors are the base's bytes"
    )
    scores = {} if options.verify == "weights" else {"scores": _verify_scores(folder, inputs, options)}
    return {"weights": asdict(weights)} | scores


def _verify_scores(folder: Path, inputs: Inputs, options: MergeOptions) -> dict[str, Any] | str:
    num_bytes = inputs.plan.num_bytes + inputs.adapter.num_bytes
    needed, free, reason = num_bytes + ACTIVATION_BYTES, available_memory_bytes(), ""
    if inputs.builder is None:
        reason = "the adapter names no answers, and yes and no are not single tokens here"
    elif needed > free:
        reason = f"{needed / 1e9:.1f} GB of memory needed, {free / 1e9:.1f} GB free"
    if reason:
        if options.verify == "scores":
            raise ModelError(f"--verify scores: {reason}; use --verify weights")
        logger.warning(f"scores of base + adapter and of the merged model are NOT compared: {reason}")
        return f"not compared: {reason}"
    domain = inputs.source.provenance.get("domain", "items")
    samples, origin = users_to_compare(inputs.source.run, NUM_SAMPLES, domain)
    users = sample_users(inputs.builder, samples)
    ids = inputs.builder.answer_ids
    result = check_scores(
        inputs.base,
        inputs.adapter,
        folder,
        users,
        ids,
        inputs.dtype,
        num_bytes,
        options.tolerance,
        origin,
        options.head == "classifier",
    )
    logger.info(
        f"scores on {result.num_prompts} prompts ({origin}, {result.dtype}): largest difference "
        f"{result.largest_difference:.3g}, mean {result.mean_difference:.3g}, {result.rank_flips} of "
        f"{result.num_pairs} pairs change order"
    )
    return asdict(result)
