"""Puts a training together: model, engine, restored state, hooks, trainer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from trsr_dist import distributed
from trsr_dist.config import Config
from trsr_dist.environment import Ranks
from trsr_dist.errors import TrsrError
from trsr_dist.files import writing
from trsr_dist.log import MetricLog, get_logger
from trsr_dist.model.loading import load_base, load_base_divided
from trsr_dist.model.lora import adapter_config, add_lora
from trsr_dist.model.recommender import Recommender
from trsr_dist.model.recomputation import enable_recomputation
from trsr_dist.planning.flops import training_flops
from trsr_dist.planning.hardware import recognize
from trsr_dist.planning.shape import ModelShape
from trsr_dist.planning.tokens import Workload
from trsr_dist.run import RunFolder, manifest_hash
from trsr_dist.train.checkpoints import Checkpoint, CheckpointFolder, TrainerState
from trsr_dist.train.elastic import gather_state, restore_state, start_from
from trsr_dist.train.engine import Engine
from trsr_dist.train.meter import Sums
from trsr_dist.train.monitor import Monitor
from trsr_dist.train.prepare import Prepared
from trsr_dist.train.step import StepRunner
from trsr_dist.train.trainer import Control, Hooks, LoopSettings, Trainer

log = get_logger("train")


@dataclass(frozen=True)
class Build:
    """Everything a training consists of; each part is made when it is first asked for.

    All ranks ask for the same parts in the same order.
    """

    config: Config
    run: RunFolder
    ranks: Ranks
    prepared: Prepared
    checkpoints: CheckpointFolder
    checkpoint: Checkpoint | None
    """To go on from."""
    control: Control

    def trainer(self) -> Trainer:
        """The loop, ready to run."""
        engine, state = self.engine, self.state
        runner = StepRunner(
            engine,
            self.config.train.loss,
            self.prepared.builder.answer_ids,
            self.config.train.row_tokens,
            self.config.run.seed,
            self.control.heartbeat,
        )
        evaluate = None if self.prepared.validator is None else self.evaluate
        hooks = Hooks(self.save, evaluate, self.mark_best)
        stream, monitor = self.prepared.stream, self.monitor
        return Trainer(engine, stream, runner, self.loop_settings, hooks, state, monitor, self.control)

    @cached_property
    def model(self) -> Recommender:
        """The base with fresh LoRA layers, on this rank's device or, under ZeRO-3, divided over the ranks."""
        prepared, lora = self.prepared, self.config.lora
        if prepared.zero.stage == 3:
            base = load_base_divided(prepared.source, prepared.dtype, prepared.zero_config)
        else:
            base = load_base(prepared.source, prepared.dtype, distributed.device_of(self.ranks), prepared.model_config)
        seed = self.config.run.seed
        config = add_lora(base, lora.r, lora.alpha, lora.dropout, lora.target_modules, lora.use_rslora, seed, lora.init)
        if self.config.train.activation_checkpointing:
            enable_recomputation(base)
        base.peft_adapter_config = config
        return Recommender(base, prepared.builder.answer_ids, prepared.backend)

    @cached_property
    def engine(self) -> Engine:
        """The engine, with the checkpoint's weights and moments."""
        train = self.config.train
        engine = Engine(self.model, self.prepared.zero_config, train.weight_decay, train.adam_betas)
        if self.checkpoint is not None:
            restore_state(engine, self.checkpoint.tensors, self.checkpoint.state.adam_step)
            log.info("resumed from %s", self.checkpoint.folder)
        elif self.prepared.initial is not None:
            start_from(engine, self.prepared.initial.weights)
            log.info("starts from %s", self.prepared.initial.folder)
        return engine

    @property
    def is_finished(self) -> bool:
        """Whether the checkpoint is that of a finished training."""
        patience = self.config.train.early_stopping_patience
        is_validated = self.prepared.validator is None or not self.state.awaits_validation
        return self.checkpoint is not None and is_validated and self.state.is_over(self.prepared.num_steps, patience)

    @cached_property
    def state(self) -> TrainerState:
        """Where to go on, under this run's settings."""
        prepared, train = self.prepared, self.config.train
        start = TrainerState(0, 0, {}) if self.checkpoint is None else self.checkpoint.state
        state = replace(start, settings=self.settings)
        if prepared.validator is None:
            return state
        valid = manifest_hash(self.run.split("valid"))
        users = {"users": prepared.validator.num_users, "shards": valid}
        return state.under({"metric": train.best_metric, **users})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What the losses depend on beside data and model."""
        train = self.config.train.model_dump(mode="json")
        names = (
            "loss",
            "init_adapter",
            "learning_rate",
            "warmup_ratio",
            "schedule",
            "weight_decay",
            "adam_betas",
            "max_grad_norm",
        )
        lora = self.config.lora.model_dump(mode="json")
        if isinstance(lora["target_modules"], list):
            lora["target_modules"].sort()  # the order says nothing
        settings = {f"train.{name}": train[name] for name in names} | {"steps": self.prepared.num_steps}
        return settings | {f"lora.{key}": value for key, value in lora.items()}

    @property
    def loop_settings(self) -> LoopSettings:
        train = self.config.train
        return LoopSettings(
            num_steps=self.prepared.num_steps,
            learning_rate=train.learning_rate,
            warmup_ratio=train.warmup_ratio,
            schedule=train.schedule,
            save_every_steps=train.save_every_steps,
            evaluate_every_steps=train.evaluate_every_steps,
            early_stopping_patience=train.early_stopping_patience,
            max_bad_steps=train.max_bad_steps,
        )

    @cached_property
    def monitor(self) -> Monitor:
        metrics = None
        if self.ranks.is_main:
            metrics = MetricLog(
                self.run.root, "train", self.config.run.tensorboard, self.state.step + 1, self.checkpoints.fence
            )
        return Monitor(
            metrics,
            self.prepared.num_steps,
            self.state.step,
            self.config.train.log_every_steps,
            self.count_flops,
            self.peak_flops,
        )

    @property
    def peak_flops(self) -> float:
        """Of all devices, per second, by their data sheet; 0 where unknown."""
        if not torch.cuda.is_available():
            return 0.0
        device = recognize(torch.cuda.get_device_name())
        return 0.0 if device is None else device.flops_per_second * self.ranks.world_size

    def count_flops(self, sums: Sums) -> float:
        """Floating point operations of forward and backward passes, recomputation not counted (as MFU is defined).

        An answer reads its whole prompt, so the answers' pairs are the tokens of separate sequences.
        """
        if self.shape is None:
            return 0.0
        work = Workload(round(sums.tokens), round(sums.attended_pairs), round(sums.answers), round(sums.users))
        whole = self.config.train.loss == "full_text"
        answer_pairs = None if whole else round(sums.separate_tokens)
        return training_flops(self.shape, work, self.num_lora_parameters, full_head=whole, answer_pairs=answer_pairs)

    @cached_property
    def shape(self) -> ModelShape | None:
        """None where the model's config is not of the common form."""
        try:
            return ModelShape.from_config(self.prepared.model_config.to_dict())
        except TrsrError:
            return None

    @cached_property
    def num_lora_parameters(self) -> int:
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.trainable().values())

    def save(self, state: TrainerState) -> None:
        """Write a checkpoint; a problem of rank 0 is raised on all ranks.

        Raises:
            CheckpointError: what was read back is not what was written.
            RunError: the disk is full, or the folder was lost to another process. The checkpoints before it are intact.
        """
        tensors = gather_state(self.engine)
        distributed.on_rank_zero(lambda: self._write(tensors, state))

    def _write(self, tensors: dict[str, torch.Tensor], state: TrainerState) -> None:
        with writing(self.checkpoints.root):
            self.checkpoints.save(tensors, state, self.adapter_config, self.provenance(state))

    def mark_best(self, step: int) -> None:
        if self.ranks.is_main:
            self.checkpoints.mark_best(step)

    def evaluate(self, step: int) -> float:
        """Rank the validation users; the value of ``train.best_metric``."""
        validator = self.prepared.validator
        metrics = validator.run(self.engine, lambda: self.control.heartbeat.at(step, "validation"))
        name = self.config.train.best_metric
        self.monitor.evaluated(step, metrics)
        log.info("step %d  validation of %d users  %s %.4f", step, validator.num_users, name, metrics[name])
        return metrics[name]

    def close(self, state: TrainerState) -> None:
        """Write the hyperparameters with what became of them."""
        best = {} if state.best_value is None else {self.config.train.best_metric: state.best_value}
        self.monitor.close(self.settings, best)

    @property
    def adapter_config(self) -> dict[str, Any]:
        return adapter_config(self.model.causal.peft_adapter_config, self.prepared.name, self.config.model.revision)

    @property
    def origin(self) -> dict[str, str]:
        """The adapter that the training has started from; empty where it was a fresh one."""
        if self.checkpoint is not None:
            return self.checkpoint.provenance.get("init_adapter", {})
        initial = self.prepared.initial
        return {} if initial is None else {"folder": str(initial.folder), "sha256": initial.digest}

    def provenance(self, state: TrainerState) -> dict[str, Any]:
        """What a later stage must know of a checkpoint; kept with it and with the merged model."""
        prepared, train = self.prepared, self.config.train
        return {
            "base": {
                "name_or_path": prepared.name,
                "revision": self.config.model.revision,
                "fingerprint": prepared.fingerprint,
            },
            "init_adapter": self.origin,
            "prompt": prepared.builder.settings,
            "answer_ids": list(prepared.builder.answer_ids),
            "domain": self.config.domain,
            "shards": {"train": manifest_hash(self.run.split("train"))},
            "train": {
                "step": state.step,
                "num_steps": prepared.num_steps,
                "loss": train.loss,
                "negatives_per_positive": train.negatives_per_positive,
                "learning_rate": train.learning_rate,
                "precision": prepared.precision,
                "zero_stage": prepared.zero.stage,
                "best_value": state.best_value,
                "seed": self.config.run.seed,
            },
            "config": self.config.model_dump(mode="json"),
        }
