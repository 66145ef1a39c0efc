"""One rank that trains an adapter for two steps at every ZeRO stage and saves DeepSpeed's own checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from tests.merge.models import random_peft_model

STAGES = (0, 1, 2, 3)


def train_stages(rank: int, world_size: int, base: Path, output: Path) -> None:
    """One after the other, in the process group that there is."""
    # Compiling this operator takes a minute, and training does not use it.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage in STAGES:
        train(base, output / f"zero{stage}", stage)
    torch.distributed.barrier()


def train(base: Path, folder: Path, stage: int) -> None:
    """Stage 1 also saves the frozen base, the others leave it out."""
    model = random_peft_model(base, modules_to_save=["lm_head"], rank_pattern={"q_proj": 3})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=0.01), config=config)
    rank = torch.distributed.get_rank()
    for step in range(2):
        ids = torch.arange(8).unsqueeze(0) + 10 * step + rank
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag="global_step2", exclude_frozen_parameters=stage != 1)
    truth = {n: full_value(p, stage) for n, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        model.peft_config["default"].save_pretrained(str(folder))
        save_file(truth, folder / "truth.safetensors")


def full_value(parameter: torch.nn.Parameter, stage: int) -> torch.Tensor:
    value = parameter.detach() if stage == 0 else safe_get_full_fp32_param(parameter)
    return value.clone().contiguous()
