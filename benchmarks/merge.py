"""Merging a LoRA adapter: streamed, against ``cp`` of the same files and PEFT's merge_and_unload, in one run."""

from __future__ import annotations

import logging
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.common import LLAMA2_7B, Row, in_child, peak_bytes, rate_row, ratio_row, timed
from trsr_dist.files import sync_path, write_json
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.weights import INDEX, header_bytes

Shapes = dict[str, tuple[int, ...]]
REPEATS = 3
NUM_LAYERS = 2
SHARD_BYTES = 5 * 10**9
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def run(scale: float) -> list[Row]:
    """Bytes per second and growth of memory; each way in a separate process, in turns."""
    ways: dict[str, Callable[[Path], None]] = {
        "cp": _copy,
        "merge": _merge,
        "merge + read-back": _merge_and_verify,
        "merge_and_unload": _peft,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = write_base(folder / "base", LLAMA2_7B | {"num_hidden_layers": max(1, round(NUM_LAYERS * scale))})
        write_adapter(folder / "adapter", base)
        num_bytes = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(REPEATS):
            for way, function in ways.items():
                found[way].append(in_child(_measure, function, folder))
                shutil.rmtree(folder / "out")
    return _rows(found, num_bytes)


def _rows(found: dict[str, list[tuple[float, float, float]]], num_bytes: int) -> list[Row]:
    """``cp`` reads and writes each byte once, as a merge must: its rate is the bound."""
    case = f"{num_bytes / 1e9:.2f} GB bf16, rank 8, with fsync"
    walls = {way: [wall for wall, _, _ in runs] for way, runs in found.items()}
    bound = num_bytes / 1e9 / median(walls["cp"])
    rows = []
    for way, runs in found.items():
        rows.append(rate_row("merge", case, way, num_bytes / 1e9, walls[way], "GB/s", bound))
        cpu = [seconds for _, seconds, _ in runs]
        rows.append(rate_row("merge", case, f"{way}: CPU", num_bytes / 1e9, cpu, "GB/CPU-s"))
        rows.append(Row("merge", case, f"{way}: memory", max(grown for _, _, grown in runs) / 1e6, "MB", "growth"))
    return rows + [
        ratio_row("merge", case, f"{other} / merge", walls[other], walls["merge"])
        for other in ("cp", "merge_and_unload")
    ]


def _measure(function: Callable[[Path], None], folder: Path) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds, and bytes by which this process or its largest child grew."""
    logging.disable()
    before = peak_bytes()
    with timed() as timer:
        function(folder)
        for path in (folder / "out").iterdir():
            sync_path(path)
    return timer.wall, timer.cpu, peak_bytes() - before


def _copy(folder: Path) -> None:
    subprocess.run(["cp", "-r", str(folder / "base"), str(folder / "out")], check=True)


def _merge(folder: Path) -> None:
    merge(folder / "adapter", folder / "out", MergeOptions(verify="none"))


def _merge_and_verify(folder: Path) -> None:
    merge(folder / "adapter", folder / "out", MergeOptions(verify="weights"))


def _peft(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", config=config, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(folder / "out")


def llama_shapes(config: LlamaConfig) -> Shapes:
    """Names and shapes of a Llama model's tensors, in their usual order."""
    hidden, middle = config.hidden_size, config.intermediate_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}.weight": (hidden, hidden) for name in TARGETS}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (middle, hidden) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, middle)
        shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def write_base(folder: Path, sizes: dict[str, int]) -> Path:
    """A sharded bf16 base in the shape of a real one, written without a model in memory; its values are noise."""
    config = LlamaConfig(**sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    shards = _shards(llama_shapes(config))
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for name, shapes in zip(names, shards, strict=True):
        _write_shard(folder / name, shapes)
    places = {tensor: name for name, shapes in zip(names, shards, strict=True) for tensor in shapes}
    write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    return folder


def _write_shard(path: Path, shapes: Shapes) -> None:
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    block = noise.view(torch.uint8).numpy().tobytes()
    with open(path, "wb") as stream:
        stream.write(header_bytes([(tensor, "BF16", shape) for tensor, shape in shapes.items()]))
        rest = sum(_num_bytes(shape) for shape in shapes.values())
        while rest:
            rest -= stream.write(block[: min(rest, len(block))])


def _shards(shapes: Shapes) -> list[Shapes]:
    shards: list[Shapes] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size + _num_bytes(shape) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += _num_bytes(shape)
    return shards


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 2 * torch.Size(shape).numel()


def write_adapter(folder: Path, base: Path, rank: int = 8) -> Path:
    """An adapter on the attention's four projections, its values noise."""
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, shape in llama_shapes(LlamaConfig.from_pretrained(base)).items():
        if "self_attn" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) * 0.02
            tensors[f"{module}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
