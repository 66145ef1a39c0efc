"""Merge one checkpoint into one Hugging Face folder, or say why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trsr_dist.bases import base_folder
from trsr_dist.errors import RunError
from trsr_dist.files import atomic_folder, read_json, write_json, writing
from trsr_dist.hashing import digest
from trsr_dist.log import get_logger
from trsr_dist.merge.adapter import adapter_facts, adapter_hash, write_adapter
from trsr_dist.merge.card import model_card
from trsr_dist.merge.companions import adapt_config, copy_companions
from trsr_dist.merge.guards import STAGE, check_output, check_space
from trsr_dist.merge.inputs import DTYPES, Inputs, MergeOptions, prepare
from trsr_dist.merge.proof import verify
from trsr_dist.merge.source import Source, base_of, find_source
from trsr_dist.merge.stream import write_weights
from trsr_dist.model.fingerprint import base_fingerprint
from trsr_dist.model.places import PROVENANCE
from trsr_dist.run import FolderLock, folder_lock, is_finished, write_manifest

logger = get_logger("merge")


def merge(checkpoint: Path, output: Path, options: MergeOptions) -> None:
    """Merge ``checkpoint`` into ``output``; a finished merge with the same inputs and settings is left alone.

    Raises:
        TrsrError: an input is damaged or does not fit, the result is not equal, or there is no room. Nothing is left
            behind then, and an older output stays.
    """
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
    provenance = make_provenance(inputs, options)
    with atomic_folder(output, lock.check) as folder:
        if options.adapter_only:
            write_adapter(inputs.adapter, folder, inputs.base_name.name_or_path)
        else:
            copy_companions(inputs.base, inputs.tokenizer, folder)
            adapt_config(folder, inputs.plan.unties, DTYPES.get(options.dtype))
            write_weights(folder, inputs.plan)
            provenance["merge"]["verification"] = verify(folder, inputs, options)
        (folder / "README.md").write_text(model_card(provenance, _metrics(inputs.source)), encoding="utf-8")
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
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "untied_embeddings": inputs.plan.unties,
        "changed_tensors": sum(output.change is not None for output in inputs.plan.outputs),
        "config_hash": digest(read_json(inputs.base / "config.json", finite=False)),
        "adapter": adapter_facts(inputs.adapter),
    }
    return {**recorded, "base": base, **prompt, "merge": facts}


def _metrics(source: Source) -> dict[str, Any] | None:
    """The run's own evaluation, the test split before the validation split."""
    if source.run is None:
        return None
    paths = (source.run / "evaluation" / f"{split}.json" for split in ("test", "valid"))
    return next((read_json(path) for path in paths if path.is_file()), None)
