"""Puts a training together, in one order on all ranks: model, engine, restored weights, loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from trsr_dist import distributed
from trsr_dist.config import Config
from trsr_dist.config.kinds import OnResume, marked_settings
from trsr_dist.environment import Ranks, available_memory_bytes, return_large_blocks
from trsr_dist.errors import TrsrError
from trsr_dist.log import get_logger
from trsr_dist.model.adapters import adapter_config, add_lora
from trsr_dist.model.loading import load_base, load_base_divided
from trsr_dist.model.recommender import Recommender, enable_recomputation
from trsr_dist.planner.flops import Workload, training_flops
from trsr_dist.planner.hardware import CPU_PROCESS_BYTES, GB, recognize
from trsr_dist.planner.memory import KEPT_BY_CPU, KeptActivations, rank_memory
from trsr_dist.planner.shape import ModelShape
from trsr_dist.run import RunFolder, manifest_hash
from trsr_dist.trackers import open_metrics
from trsr_dist.train.checkpoints import Checkpoint, CheckpointFolder, TrainerState
from trsr_dist.train.elastic import Saving, restore_state, start_from
from trsr_dist.train.engine import Engine
from trsr_dist.train.meter import Sums
from trsr_dist.train.monitor import Monitor
from trsr_dist.train.prepare import Prepared
from trsr_dist.train.step import StepRunner
from trsr_dist.train.trainer import Control, LoopSettings, Trainer

log = get_logger("train")


def resume_settings(config: Config, num_steps: int) -> tuple[dict[str, Any], dict[str, OnResume]]:
    """What the losses depend on beside data and model: values to record, and what a change of each means."""
    settings: dict[str, Any] = {}
    marks: dict[str, OnResume] = {}
    for name, section in (("train", config.train), ("lora", config.lora)):
        values = section.model_dump(mode="json")
        found = {f"{name}.{key}": mark for key, mark in marked_settings(section).items()}
        settings |= {key: values[key.partition(".")[2]] for key in found}
        marks |= found
        if name == "train":
            settings["steps"] = num_steps
    if isinstance(settings["lora.target_modules"], list):
        settings["lora.target_modules"].sort()  # the order says nothing
    return settings, marks


def first_state(
    config: Config, run: RunFolder, prepared: Prepared, checkpoint: Checkpoint | None, settings: dict[str, Any]
) -> TrainerState:
    """Where to go on, under this run's settings."""
    start = TrainerState(0, 0, {}) if checkpoint is None else checkpoint.state
    state = replace(start, settings=settings)
    if prepared.validator is None:
        return state
    valid = manifest_hash(run.split("valid"))
    return state.under({"metric": config.train.best_metric, "users": prepared.validator.num_users, "shards": valid})


def build_trainer(
    config: Config,
    run: RunFolder,
    ranks: Ranks,
    prepared: Prepared,
    checkpoints: CheckpointFolder,
    checkpoint: Checkpoint | None,
    state: TrainerState,
    control: Control,
) -> Trainer:
    """The loop, ready to run. All ranks call it.

    Args:
        config: of the run.
        run: its folder.
        ranks: this process.
        prepared: checked and planned.
        checkpoints: where the loop saves.
        checkpoint: to go on from; None: a new training.
        state: of ``first_state``.
        control: what watches over this rank.
    """
    train = config.train
    model, adapter = build_model(config, ranks, prepared)
    engine = Engine(model, prepared.zero_config, train.weight_decay, train.adam_betas)
    _restore(engine, prepared, checkpoint)
    saving = Saving(engine, checkpoints, ranks.is_main, adapter, _provenance(config, run, prepared, checkpoint))
    metrics = None
    if ranks.is_main:
        metrics = open_metrics(config, run.root, "train", state.step + 1, checkpoints.fence)
    monitor = Monitor(
        metrics,
        prepared.num_steps,
        state.step,
        train.log_every_steps,
        flops_counter(prepared, engine, train.loss == "full_text"),
        peak_flops(ranks.world_size),
    )
    answer_ids, seed = prepared.builder.answer_ids, config.run.seed
    runner = StepRunner(
        engine, train.loss, answer_ids, train.row_tokens, seed, control.heartbeat,
        train.teacher_weight, train.teacher_temperature,
    )  # fmt: skip
    return Trainer(
        engine, prepared.stream, runner, _loop_settings(config, prepared), saving, prepared.validator, state, monitor,
        control,
    )  # fmt: skip


def build_model(config: Config, ranks: Ranks, prepared: Prepared) -> tuple[Recommender, dict[str, Any]]:
    """The base with fresh LoRA layers, on this rank's device or, under ZeRO-3, divided over the ranks.

    Returns:
        The model, and the content of its ``adapter_config.json``.
    """
    lora = config.lora
    if distributed.device_of(ranks).type == "cpu":
        spare_memory(planned_bytes(config, prepared, ranks.world_size), ranks.local_world_size)
    if prepared.zero.stage == 3:
        base = load_base_divided(prepared.source, prepared.dtype, prepared.zero_config)
    else:
        base = load_base(prepared.source, prepared.dtype, distributed.device_of(ranks), prepared.model_config)
    layers = add_lora(
        base, lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.use_rslora, config.run.seed, lora.init
    )
    if config.train.activation_checkpointing:
        enable_recomputation(base)
    model = Recommender(base, prepared.builder.answer_ids, prepared.backend)
    return model, adapter_config(layers, prepared.name, config.model.revision)


def planned_bytes(config: Config, prepared: Prepared, world_size: int) -> int:
    """What a rank needs in a step, by the planner; 0 where the model's config is not of the common form."""
    train, lora = config.train, config.lora
    try:
        shape = ModelShape.from_config(prepared.model_config.to_dict())
        num_lora_parameters = shape.num_lora_parameters(lora.r, lora.target_modules)
    except TrsrError:
        return 0
    kept = KeptActivations(
        train.activation_checkpointing, lora.target_modules, train.loss != "full_text", lora.dropout > 0
    )
    planned = rank_memory(
        shape, num_lora_parameters, train.row_tokens, world_size, prepared.zero, prepared.precision, kept
    )
    return planned.device + planned.host


def spare_memory(planned_bytes: int, ranks_on_node: int) -> None:
    """Keep to the planned memory where a node has too little for what processes on CPU cores keep otherwise."""
    share = available_memory_bytes() // ranks_on_node - CPU_PROCESS_BYTES
    if KEPT_BY_CPU * planned_bytes > share:
        log.info(
            "%.2f GB are free for this rank's model, %.2f are planned: freed memory is returned at once, which takes "
            "time",
            share / GB,
            planned_bytes / GB,
        )
        return_large_blocks()


def _restore(engine: Engine, prepared: Prepared, checkpoint: Checkpoint | None) -> None:
    """The checkpoint's weights and moments, or those of an earlier training's adapter."""
    if checkpoint is not None:
        restore_state(engine, checkpoint.tensors, checkpoint.state.adam_step)
        log.info("resumed from %s", checkpoint.folder)
    elif prepared.initial is not None:
        start_from(engine, prepared.initial.weights)
        log.info("starts from %s", prepared.initial.folder)


def _loop_settings(config: Config, prepared: Prepared) -> LoopSettings:
    train = config.train
    return LoopSettings(
        num_steps=prepared.num_steps,
        learning_rate=train.learning_rate,
        warmup_ratio=train.warmup_ratio,
        schedule=train.schedule,
        save_every_steps=train.save_every_steps,
        evaluate_every_steps=train.evaluate_every_steps,
        best_metric=train.best_metric,
        early_stopping_patience=train.early_stopping_patience,
        max_bad_steps=train.max_bad_steps,
    )


def _provenance(
    config: Config, run: RunFolder, prepared: Prepared, checkpoint: Checkpoint | None
) -> Callable[[TrainerState], dict[str, Any]]:
    """From a state to what a later stage must know of its checkpoint; kept with it and with the merged model."""
    train, initial = config.train, prepared.initial
    origin: dict[str, str] = {}
    if checkpoint is not None:
        origin = checkpoint.provenance.get("init_adapter", {})
    elif initial is not None:
        origin = {"folder": str(initial.folder), "sha256": initial.digest}
    teacher = {} if prepared.stream.teacher is None else {"teacher": prepared.stream.teacher.manifest}
    base = {"name_or_path": prepared.name, "revision": config.model.revision, "fingerprint": prepared.fingerprint}

    def describe(state: TrainerState) -> dict[str, Any]:
        return {
            "base": base,
            "init_adapter": origin,
            "prompt": prepared.builder.settings,
            "answer_ids": list(prepared.builder.answer_ids),
            "domain": config.domain,
            "shards": {"train": manifest_hash(run.split("train"))},
            **teacher,
            "train": {
                "step": state.step,
                "num_steps": prepared.num_steps,
                "loss": train.loss,
                "negatives_per_positive": train.negatives_per_positive,
                "learning_rate": train.learning_rate,
                "precision": prepared.precision,
                "zero_stage": prepared.zero.stage,
                "best_value": state.best_value,
                "seed": config.run.seed,
            },
            "config": config.model_dump(mode="json"),
        }

    return describe


def peak_flops(world_size: int) -> float:
    """Of all devices, per second, by their data sheet; 0 where unknown."""
    device = recognize(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return 0.0 if device is None else device.flops_per_second * world_size


def flops_counter(prepared: Prepared, engine: Engine, whole_text: bool) -> Callable[[Sums], float]:
    """From sums to floating point operations of forward and backward passes, recomputation not counted (as MFU is
    defined); 0 where the model's config is not of the common form.

    An answer reads its whole prompt, so the answers' pairs are the tokens of separate sequences.
    """
    try:
        shape = ModelShape.from_config(prepared.model_config.to_dict())
    except TrsrError:
        return lambda sums: 0.0
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.trainable().values())

    def count(sums: Sums) -> float:
        work = Workload(round(sums.tokens), round(sums.attended_pairs), round(sums.answers), round(sums.users))
        answer_pairs = None if whole_text else round(sums.separate_tokens)
        return training_flops(shape, work, num_parameters, full_head=whole_text, answer_pairs=answer_pairs)

    return count
