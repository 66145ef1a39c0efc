"""One rank that trains an adapter for two steps at every ZeRO stage and saves DeepSpeed's own checkpoints.

Run as ``python -m tests.merge.engine_ranks BASE OUTPUT`` with the ranks' variables set.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trsr_dist.environment import prepare_process

prepare_process(1)

import deepspeed  # noqa: E402
import torch  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tests.merge.models import random_peft_model  # noqa: E402

STAGES = (0, 1, 2, 3)


def main(base: Path, output: Path) -> None:
    # Compiling this operator takes a minute, and training does not use it.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for stage in STAGES:
        train(base, output / f"zero{stage}", stage)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
