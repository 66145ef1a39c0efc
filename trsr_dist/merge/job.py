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
from trsr_dist.merge.card import is_evaluation_of, model_card
from trsr_dist.merge.changes import adapter_facts, adapter_hash, write_adapter
from trsr_dist.merge.classifier import write_padding
from trsr_dist.merge.inputs import DTYPES, STAGE, Inputs, MergeOptions, check_output, check_space, prepare
from trsr_dist.merge.output import adapt_config, copy_other_files, write_weights
from trsr_dist.merge.scores import (
    ACTIVATION_BYTES,
    NUM_SAMPLES,
    built_in_samples,
    check_scores,
    sample_users,
)
from trsr_dist.merge.source import Source, base_of, find_source
from trsr_dist.merge.verify import check_weights
from trsr_dist.model.artifacts import PROVENANCE, base_fingerprint
from trsr_dist.records import Sample
from trsr_dist.run import MANIFEST, is_finished, write_manifest
from trsr_dist.shards.reader import ShardSet

logger = get_logger("merge")


def merge(checkpoint: Path, output: Path, options: MergeOptions) -> None:
    """Merge ``checkpoint`` into ``output``; a finished merge with the same inputs and settings is left alone.

    Raises:
        TrsrError: an input is damaged or does not fit, the result is not equal, or there is no room. Nothing is left
            behind then, and an older output stays.
    """
    if options.adapter_only and options.head != "causal":
        raise ConfigError("--adapter-only writes no head, --head classifier is one; leave out one of the two")
    source = find_source(checkpoint)
    if source.kind == "merged":
        logger.info(f"{source.folder}: already a merged model; nothing to do")
        return
    adapter = source.read()
    base_name = base_of(source, adapter, options.base)
    base = base_folder(base_name, source.run, "name the base's folder with --base")
    fingerprint = base_fingerprint(base)
    check_output(output, [source.folder, base], options.force or options.update)
    if options.dry_run:
        plan = prepare(source, adapter, base_name, base, fingerprint, options).plan
        logger.info(f"would write {plan.num_bytes / 1e9:.3f} GB in {len(plan.files)} files to {output}")
        return
    settings = {"dtype": options.dtype, "max_shard_bytes": options.max_shard_bytes, "only": options.adapter_only}
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
    """Whether ``output`` is this very merge.

    Raises:
        RunError: it is another one, and neither ``force`` nor ``update`` is set.
    """
    try:
        return is_finished(output, settings, hashes, options.force)
    except RunError as error:
        if options.update:
            logger.info(f"{output}: of another checkpoint or other settings; made again")
            return False
        raise RunError(f"{error} (--update does so only where something has changed)") from None


def _write(
    output: Path,
    inputs: Inputs,
    options: MergeOptions,
    settings: dict[str, Any],
    hashes: dict[str, str],
    lock: FolderLock,
) -> None:
    check_space(output, inputs.adapter.num_bytes if options.adapter_only else inputs.plan.num_bytes)
    provenance, metrics, run = make_provenance(inputs, options), None, inputs.source.run
    if run is not None:  # its own evaluation, the test split before the validation split
        paths = (run / "evaluation" / f"{split}.json" for split in ("test", "valid"))
        found = (read_json(path) for path in paths if path.is_file())
        metrics = next((results for results in found if is_evaluation_of(results, provenance)), None)
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
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        write_manifest(folder, STAGE, settings, hashes, files=files)


def make_provenance(inputs: Inputs, options: MergeOptions) -> dict[str, Any]:
    """The checkpoint's provenance, completed for adapters from elsewhere, with the facts of this merge."""
    recorded, builder = inputs.source.provenance, inputs.builder
    base = {
        "name_or_path": inputs.base_name.name_or_path,
        "revision": inputs.base_name.revision,
        "fingerprint": inputs.fingerprint,
    }
    prompt = {"prompt": builder.settings, "answer_ids": list(builder.answer_ids)} if builder is not None else {}
    facts = {
        "source": f"{inputs.source.kind} {inputs.source.folder.name}",
        "adapter_only": options.adapter_only,
        "head": options.head,
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "untied_embeddings": inputs.plan.unties,
        "changed_tensors": sum(output.change is not None for output in inputs.plan.outputs),
        "config_hash": digest(read_json(inputs.base / CONFIG, finite=False)),
        "adapter": adapter_facts(inputs.adapter),
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
    samples, origin = _samples(inputs.source)
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


def _samples(source: Source) -> tuple[list[Sample], str]:
    """Users of the run's own held-out data where it is at hand, and where they come from."""
    for split in ("valid", "test"):
        folder = source.run / "shards" / split if source.run is not None else None
        if folder is not None and (folder / MANIFEST).is_file():
            shards = ShardSet(folder, any_wording=True)
            samples = shards.read_many(range(min(NUM_SAMPLES, len(shards))))
            shards.close()
            return samples, f"shards/{split}"
    return built_in_samples(source.provenance.get("domain", "items")), "built-in prompts"
