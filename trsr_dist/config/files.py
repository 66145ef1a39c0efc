"""Files of settings: where they are found, YAML as people mean it, and DeepSpeed's, which hold mechanics only. Pure.

Of YAML, whatever would be read as something else than it looks like is refused, with a hint: PyYAML follows YAML 1.1,
where 010 is 8, 1:30 is 90, 1e-4 is a text, 2024-01-02 a date and the last of two equal keys counts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Required

import yaml
from pydantic import ConfigDict, Field
from typing_extensions import TypedDict
from yaml.constructor import ConstructorError

from trsr_dist.errors import ConfigError, DataError
from trsr_dist.files import read_text
from trsr_dist.json_text import parse_json
from trsr_dist.printable import CONTROLS

PACKAGE = Path(__file__).parents[1]
OWNED = {
    "train_batch_size": "train.rows_per_step",
    "train_micro_batch_size_per_gpu": "train.rows_per_step",
    "gradient_accumulation_steps": "train.rows_per_step",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.learning_rate, train.weight_decay and train.adam_betas",
    "scheduler": "train.schedule and train.warmup_ratio",
    "tensorboard": "run.tensorboard",
    "steps_per_print": "train.log_every_steps",
}
"""Keys of a DeepSpeed config that have an owner in the run's config."""

OFFLOADS = ("offload_optimizer", "offload_param")
ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.\d*)?)$")
"""Octal without 0o, or sexagesimal."""
TIMESTAMP = "tag:yaml.org,2002:timestamp"
FLOAT = "tag:yaml.org,2002:float"


Size = Annotated[float, Field(ge=0, multiple_of=1)]
"""Such as 5e8, which is no int in JSON."""
NO_OTHERS = ConfigDict(extra="forbid")


class Offload(TypedDict, total=False):
    """Where DeepSpeed keeps state; not NVMe, of which no checkpoint can be made."""

    __pydantic_config__ = NO_OTHERS
    device: Literal["none", "cpu"]
    pin_memory: bool
    fast_init: bool
    buffer_count: Size
    buffer_size: Size
    max_in_cpu: Size


class Zero(TypedDict, total=False):
    """ZeRO's mechanics; other keys of DeepSpeed change what is trained, or how its state is divided."""

    __pydantic_config__ = NO_OTHERS
    stage: Required[Annotated[int, Field(ge=0, le=3)]]
    offload_optimizer: Offload
    offload_param: Offload
    allgather_bucket_size: Size
    allgather_partitions: bool
    contiguous_gradients: bool
    ignore_unused_parameters: bool
    log_trace_cache_warnings: bool
    memory_efficient_linear: bool
    overlap_comm: bool
    reduce_bucket_size: Size
    reduce_scatter: bool
    round_robin_gradients: Literal[False]
    stage3_gather_16bit_weights_on_model_save: bool
    stage3_max_live_parameters: Size
    stage3_max_reuse_distance: Size
    stage3_model_persistence_threshold: Size
    stage3_param_persistence_threshold: Size
    stage3_prefetch_bucket_size: Size
    sub_group_size: Size
    use_multi_rank_bucket_allreduce: bool


class DeepSpeedFile(TypedDict, total=False):
    """All that a file of ``ds_configs/`` may hold: mechanics, and what DeepSpeed prints."""

    __pydantic_config__ = NO_OTHERS
    zero_optimization: Required[Zero]
    comms_logger: Any
    dump_state: Any
    flops_profiler: Any
    memory_breakdown: Any
    wall_clock_breakdown: Any


def find_file(name: str) -> Path:
    """A file named relative to the working folder, else one that is shipped."""
    return Path(name) if Path(name).exists() else shipped_file(name)


def shipped_file(name: str) -> Path:
    """A file of ``configs/``, ``ds_configs/``, ``launch/`` or ``tools/``.

    A wheel has these folders inside the package, the repository beside it.
    """
    return PACKAGE / name if (PACKAGE / name).exists() else PACKAGE.parent / name


def read_zero_config(path: str | Path, key: str = "train.deepspeed_config") -> dict[str, Any]:
    """Read and check a file of ``ds_configs/``.

    Args:
        path: of the file.
        key: the setting that names it, for messages.

    Raises:
        ConfigError: missing, not JSON, without a ZeRO stage, with a setting that the run's config owns, or with a key
            or value that is not supported.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ConfigError(f"{key}={path}: no such file; the shipped ones are named such as ds_configs/zero1.json")
    try:
        text = read_text(path)
        settings = parse_json(text, unique=True)
        for name in (name for name in settings if name in OWNED):
            raise ConfigError(f"{path}: {name!r} has its owner in the run's config: set {OWNED[name]}, remove it here")
        parse_json(text, DeepSpeedFile)
    except (DataError, UnicodeDecodeError, OSError) as error:
        problem = str(error).removeprefix(f"{path}: ")
        remedy = "such a file holds ZeRO's stage, buckets and offload: correct the value, or leave the key out"
        raise ConfigError(f"{key}={path}: {problem}; {remedy}") from None
    return settings


class Loader(yaml.SafeLoader):
    """Refuses keys that stand twice or are no text, numbers of bases other than they look, anchors and aliases."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TIMESTAMP]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        mapping = super().construct_mapping(node, deep)
        for key in mapping:
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"key {key!r} is no text; write it in quotes", node.start_mark)
        return mapping

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            text = f"an anchor or alias ({event.anchor!r}), which is not supported; write the value out, or in quotes"
            raise ConstructorError(None, None, text, event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        value = super().construct_scalar(node)
        if node.style is None and node.tag.endswith((":int", ":float")) and ODD_NUMBER.match(value):
            text = f"{value} is a number of base 8 or 60 in YAML; write it as a decimal number, or in quotes as a text"
            raise ConstructorError(None, None, text, node.start_mark)
        if CONTROLS.search(value):
            raise ConstructorError(None, None, f"{value!r} holds a control character", node.start_mark)
        return value


class Dumper(yaml.SafeDumper):
    """Quotes every text that ``Loader`` would read as something else."""


# YAML 1.1 wants a point and a sign in the exponent.
for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a document.

    Raises:
        ConfigError: what is wrong, and where; the caller adds in which file.
    """
    try:
        return yaml.load(text, Loader)
    except Exception as error:  # explicit tags such as !!int and !!timestamp raise all kinds
        raise ConfigError(f"not valid YAML: {error}") from None


def parse_value(text: str) -> Any:
    """The value of an override, which must be all that YAML sees: "a #b" would lose its end.

    Raises:
        ConfigError: what is wrong.
    """
    value = parse_yaml(text)
    node = yaml.compose(text, Loader)
    if node is None:
        is_whole = not text.strip()
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        is_whole = node.value == text.strip()
    else:
        is_whole = not (text[: node.start_mark.index] + text[node.end_mark.index :]).strip()
    if not is_whole:
        raise ConfigError(f"YAML reads {text!r} as {value!r}; write it in quotes of YAML, such as \"'a #b'\"")
    return value
