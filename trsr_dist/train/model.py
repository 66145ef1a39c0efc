"""The model of a training: checked before a weight is read, then loaded with LoRA layers; and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from trsr_dist.bases import BaseName, base_folder
from trsr_dist.config import Config
from trsr_dist.config.files import find_file, read_zero_config
from trsr_dist.distributed import device_of, once_per_node
from trsr_dist.environment import Ranks, available_memory_bytes, return_large_blocks
from trsr_dist.errors import ConfigError, TrsrError
from trsr_dist.log import get_logger
from trsr_dist.model.adapters import adapter_config, add_lora
from trsr_dist.model.compilation import check_compilable, compile_layers, warm_up
from trsr_dist.model.fp8 import check_fp8
from trsr_dist.model.kernels import choose_kernels, use_kernels
from trsr_dist.model.loading import load_base, load_base_divided, resolve_precision, shared_backend
from trsr_dist.model.recommender import Recommender, enable_recomputation
from trsr_dist.model.zero3 import check_equal_calls
from trsr_dist.planner.flops import Workload, training_flops
from trsr_dist.planner.hardware import CPU_PROCESS_BYTES, GB, recognize
from trsr_dist.planner.memory import KEPT_BY_CPU, StepSettings, ZeroSetting, rank_memory
from trsr_dist.planner.shape import ModelShape
from trsr_dist.pretrained import BaseSource, load_config, load_tokenizer
from trsr_dist.prompts.builder import PromptBuilder
from trsr_dist.run import RUN, RunFolder
from trsr_dist.train.engine import Engine, complete_zero_config, zero_setting
from trsr_dist.train.meter import Sums

log = get_logger("train")


@dataclass(frozen=True)
class ModelSetup:
    """What is loaded, and how."""

    source: BaseSource
    """The base, in a local folder."""
    name: str
    """Of the base as it is recorded: a path or a hub id."""
    config: PretrainedConfig
    builder: PromptBuilder
    zero: ZeroSetting
    zero_config: dict[str, Any]
    precision: str
    backend: str | None
    """Of the shared-prefix attention."""
    fused: bool
    """Whether norms, MLPs and rotary positions run on Liger's kernels."""

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


def set_up_model(config: Config, run: RunFolder, ranks: Ranks) -> ModelSetup:
    """Check config, base folder and DeepSpeed's file against each other; no weight is read. All ranks call it.

    Raises:
        ConfigError: settings that contradict each other or the model.
        ModelError: the base or its tokenizer cannot be read.
    """
    train, device = config.train, device_of(ranks)
    settings = read_zero_config(find_file(train.deepspeed_config))
    source, name = base_source(config, run, ranks)
    tokenizer, model_config = load_tokenizer(source), load_config(source)
    builder = PromptBuilder(tokenizer, **config.prompt.model_dump())
    precision = resolve_precision(train.precision, device)
    dtype = getattr(torch, precision)
    backend = shared_backend(model_config, config.model.attention, device, dtype, builder.max_tokens)
    if config.model.quantization == "fp8":
        check_fp8(device, dtype)
    fused = not config.model.compile and choose_kernels(config.model.kernels, device, model_config)
    rows_per_rank = -(-train.rows_per_step // ranks.world_size)
    zero_config = complete_zero_config(
        settings, rows_per_rank, ranks.world_size, precision, train.max_grad_norm, device.type == "cuda"
    )
    zero = zero_setting(zero_config)
    if zero.stage == 3:
        if config.model.quantization != "none":
            raise ConfigError(
                f"model.quantization={config.model.quantization} and ZeRO stage 3 exclude each other: quantized "
                "weights cannot be divided; take ds_configs/zero1.json"
            )
        check_equal_calls(backend, ranks.world_size)
    if config.model.compile:
        check_compilable(backend, config.model.quantization, zero.stage, config.model.kernels)
    return ModelSetup(source, name, model_config, builder, zero, zero_config, precision, backend, fused)


def base_source(config: Config, run: RunFolder, ranks: Ranks) -> tuple[BaseSource, str]:
    """The base in a local folder (one of the hub is fetched by one rank of each node), and its recorded name.

    Raises:
        ConfigError: no base is named.
        ModelError: it is not here and not on the hub.
    """
    if not config.model.name_or_path:
        raise ConfigError("model.name_or_path is empty: name a base model's folder or hub id")
    name = run.resolve(config.model.name_or_path)
    base = BaseName(name, config.model.revision, "")
    remedy = "set model.name_or_path to the folder or hub id of a model"
    if config.model.name_or_path.startswith(RUN):
        remedy = f"make it with tools/make_tiny_base.py, or {remedy}"
    with_code = config.model.trust_remote_code
    if not Path(name).is_dir():
        log.info("base %s: looking for it in the hub's cache, else on the hub", name)
    once_per_node(lambda: base_folder(base, None, remedy, with_code), ranks)
    folder = str(base_folder(base, None, remedy, with_code))
    return BaseSource(folder, "", with_code, config.model.quantization), name


def build_model(config: Config, ranks: Ranks, setup: ModelSetup) -> tuple[Recommender, dict[str, Any]]:
    """The base with fresh LoRA layers, on this rank's device or, under ZeRO-3, divided over the ranks.

    Returns:
        The model, and the content of its ``adapter_config.json``.
    """
    if device_of(ranks).type == "cpu":
        spare_memory(planned_bytes(config, setup, ranks.world_size), ranks.local_world_size)
    if setup.zero.stage == 3:
        base = load_base_divided(setup.source, setup.dtype, setup.zero_config)
    else:
        base = load_base(setup.source, setup.dtype, device_of(ranks), setup.config)
    layers = add_lora(base, config.run.seed, **config.lora.model_dump())
    recompute = config.train.activation_checkpointing
    # A compiler that sees forward and backward pass recomputes what is cheap by itself.
    if recompute is True or (recompute and not config.model.compile):
        enable_recomputation(base, selective=recompute == "selective")
    if setup.fused:
        log.info("norms, MLPs and rotary positions run on the kernels of liger-kernel (model.kernels)")
        use_kernels(base)
    model = Recommender(base, setup.builder.answer_ids, setup.backend)
    if config.model.compile:
        compile_layers(model)
        warm_up(model, answers_only=config.train.loss != "full_text")
    return model, adapter_config(layers, setup.name, config.model.revision)


def planned_bytes(config: Config, setup: ModelSetup, world_size: int) -> int:
    """What a rank needs in a step, by the planner; 0 where the model's config is not of the common form."""
    train, lora = config.train, config.lora
    try:
        shape = ModelShape.from_config(setup.config.to_dict())
        num_lora_parameters = shape.num_lora_parameters(lora.r, lora.target_modules)
    except TrsrError:
        return 0
    step = StepSettings(
        row_tokens=train.row_tokens,
        precision=setup.precision,
        recompute=train.activation_checkpointing,
        target_modules=lora.target_modules,
        answers_only=train.loss != "full_text",
        dropout=lora.dropout > 0,
        compiled=config.model.compile,
    )
    planned = rank_memory(shape, num_lora_parameters, step, setup.zero, world_size)
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


def peak_flops(world_size: int, precision: str) -> float:
    """Of all devices, per second, by their data sheet; 0 where unknown."""
    device = recognize(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return 0.0 if device is None else device.computing_in(precision).flops_per_second * world_size


def flops_counter(config: PretrainedConfig, engine: Engine, whole_text: bool) -> Callable[[Sums], float]:
    """From sums to floating point operations of forward and backward passes, recomputation not counted (as MFU is
    defined); 0 where the model's config is not of the common form.

    An answer reads its whole prompt, so the answers' pairs are the tokens of separate sequences.
    """
    try:
        shape = ModelShape.from_config(config.to_dict())
    except TrsrError:
        return lambda sums: 0.0
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.trainable().values())

    def count(sums: Sums) -> float:
        work = Workload(round(sums.tokens), round(sums.attended_pairs), round(sums.answers), round(sums.users))
        answer_pairs = None if whole_text else round(sums.separate_tokens)
        return training_flops(shape, work, num_parameters, full_head=whole_text, answer_pairs=answer_pairs)

    return count
