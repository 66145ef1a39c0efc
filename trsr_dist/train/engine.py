"""DeepSpeed around the recommender: building, one step, and what differs between ZeRO stages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import nn

from trsr_dist.config.files import OFFLOADS
from trsr_dist.errors import ModelError
from trsr_dist.model.recommender import Recommender
from trsr_dist.model.zero3 import skip_shared_memory_operator
from trsr_dist.planner.memory import ZeroSetting


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What an optimizer step did."""

    grad_norm: float
    """Global norm before clipping; infinite or NaN where the step was skipped."""
    is_applied: bool
    """False where a gradient was not finite on some rank: no rank has changed its weights."""


class Engine:
    """A DeepSpeed engine for a step of several rows.

    Args:
        model: with LoRA layers; only they are trainable.
        zero_config: complete (``complete_zero_config``).
        weight_decay: AdamW's.
        betas: AdamW's.
    """

    def __init__(
        self, model: Recommender, zero_config: dict[str, Any], weight_decay: float, betas: tuple[float, float]
    ) -> None:
        skip_shared_memory_operator()
        self.model = model
        self.stage: int = zero_config["zero_optimization"]["stage"]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adam = torch.optim.AdamW(trainable, lr=0.0, betas=betas, weight_decay=weight_decay)
        self.wrapped, *_ = deepspeed.initialize(model=model, optimizer=self.adam, config=zero_config)
        self.wrapped.train()  # from_pretrained leaves models in eval mode: no dropout, no recomputation
        self._world_size = self.wrapped.dp_world_size

    @property
    def device(self) -> torch.device:
        return self.wrapped.device

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's optimizer around AdamW; AdamW itself at stage 0."""
        return self.wrapped.optimizer

    def backward(self, loss: torch.Tensor) -> None:
        """Add a row's gradients. ``loss`` is this row's share of the step's loss over all ranks."""
        # DeepSpeed averages over the ranks; the shares are to be summed.
        self.wrapped.backward(loss * self._world_size, scale_wrt_gas=False)
        if not self.wrapped.is_gradient_accumulation_boundary():
            self.wrapped.step()

    def step(self, learning_rate: float) -> StepOutcome:
        """Update the weights, after the last row's ``backward``."""
        for group in self.zero_optimizer.param_groups:
            group["lr"] = learning_rate
        if self.stage == 0:
            return self._step_without_zero()
        self.wrapped.step()
        is_applied = not getattr(self.zero_optimizer, "overflow", False)
        return StepOutcome(float(self.wrapped.get_global_grad_norm()), is_applied)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by their name in the causal language model."""
        return {name: p for name, p in self.model.causal.named_parameters() if p.requires_grad}

    def _step_without_zero(self) -> StepOutcome:
        """Stage 0: DeepSpeed does not look whether gradients are finite."""
        gradients = [p.grad for p in self.trainable().values() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if norm < float("inf"):  # False for NaN too
            self.wrapped.step()
            return StepOutcome(norm, True)
        for parameter in self.trainable().values():
            parameter.grad = None
        self.wrapped.micro_steps += 1  # what DeepSpeed counts rows by
        return StepOutcome(norm, False)


def check_gradients(engine: Engine) -> None:
    """Every LoRA B must have received a gradient, before the first update: none does where the graph was cut.

    Experts are left out: the first rows may have been routed past one.

    All ranks call it, after the last backward pass of the first step with a loss: one of 0, as of damaged users that
    are left out, has gradients of 0.

    Raises:
        ModelError: names the layers without one.
    """
    from deepspeed.utils import safe_get_full_grad

    dead = []
    for name, parameter in engine.trainable().items():
        if ".lora_B." not in name or ".experts." in name:
            continue
        gradient = safe_get_full_grad(parameter) if engine.stage else parameter.grad
        if gradient is None or not gradient.any():
            dead.append(name)
    if dead:
        raise ModelError(
            f"{len(dead)} LoRA layers received no gradient in the first step with a loss, the first is {dead[0]}: the "
            "backward pass does not reach them; check lora.target_modules and train.activation_checkpointing with this "
            "model"
        )


def zero_setting(settings: dict[str, Any]) -> ZeroSetting:
    """Stage and offloading of a DeepSpeed config."""
    zero = settings["zero_optimization"]
    devices = [zero.get(key, {}).get("device", "none") for key in OFFLOADS]
    return ZeroSetting(zero["stage"], devices[0] != "none", devices[1] != "none")


def complete_zero_config(
    settings: dict[str, Any], rows_per_rank: int, world_size: int, precision: str, max_grad_norm: float, on_gpu: bool
) -> dict[str, Any]:
    """The config that DeepSpeed gets.

    Args:
        settings: of ``read_zero_config``.
        rows_per_rank: of a step; each is a micro-batch.
        world_size: number of ranks.
        precision: float32 or bfloat16.
        max_grad_norm: 0: no clipping.
        on_gpu: False: without what needs CUDA.
    """
    zero = json.loads(json.dumps(settings["zero_optimization"]))
    if zero["stage"] == 0 and precision != "float32":
        # DeepSpeed's 16-bit optimizer without ZeRO starts Adam's bias correction a step late: it trains differently.
        zero["stage"] = 1
    if not on_gpu:
        zero["overlap_comm"] = False
        for key in OFFLOADS:
            zero.get(key, {}).pop("pin_memory", None)
    return settings | {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": rows_per_rank,
        "train_batch_size": rows_per_rank * world_size,
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        # PyTorch's AdamW serves offloading too; DeepSpeed's own needs a compiler on every node.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
