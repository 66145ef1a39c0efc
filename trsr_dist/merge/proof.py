"""Proves a written folder equal to the base with its adapter, as far as the options ask and memory allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trsr_dist.errors import ModelError
from trsr_dist.log import get_logger
from trsr_dist.merge.inputs import Inputs, MergeOptions
from trsr_dist.merge.memory import available_bytes
from trsr_dist.merge.scores import ACTIVATION_BYTES, NUM_SAMPLES, built_in_samples, check_scores, sample_users
from trsr_dist.merge.source import Source
from trsr_dist.merge.verify import check_weights
from trsr_dist.records import Sample
from trsr_dist.run import MANIFEST
from trsr_dist.shards.reader import ShardSet

logger = get_logger("merge")


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
    return {"weights": weights.to_dict()} | scores


def _verify_scores(folder: Path, inputs: Inputs, options: MergeOptions) -> dict[str, Any] | str:
    hindrance = _score_hindrance(inputs)
    if hindrance:
        if options.verify == "scores":
            raise ModelError(f"--verify scores: {hindrance}; use --verify weights")
        logger.warning(f"scores of base + adapter and of the merged model are NOT compared: {hindrance}")
        return f"not compared: {hindrance}"
    samples, origin = _samples(inputs.source)
    users = sample_users(inputs.builder, samples)
    ids = inputs.builder.answer_ids
    num_bytes = inputs.plan.num_bytes + inputs.adapter.num_bytes
    result = check_scores(
        inputs.base, inputs.adapter, folder, users, ids, inputs.dtype, num_bytes, options.tolerance, origin
    )
    logger.info(
        f"scores on {result.num_prompts} prompts ({origin}, {result.dtype}): largest difference "
        f"{result.largest_difference:.3g}, mean {result.mean_difference:.3g}, {result.rank_flips} of "
        f"{result.num_pairs} pairs change order"
    )
    return result.to_dict()


def _score_hindrance(inputs: Inputs) -> str:
    """Why scores cannot be compared; empty where they can."""
    if inputs.builder is None:
        return "the adapter names no answers, and yes and no are not single tokens here"
    needed = inputs.plan.num_bytes + inputs.adapter.num_bytes + ACTIVATION_BYTES
    free = available_bytes()
    return f"{needed / 1e9:.1f} GB of memory needed, {free / 1e9:.1f} GB free" if needed > free else ""


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
