"""Folders of bases, adapters and checkpoints, changed in a file, ranked with and merged.

Oracle: success means the scores of the unchanged folder, or scores that the change explains: another number in a
config, other words of a tokenizer or other bytes of a tensor, in a folder that nothing vouches for. In a checkpoint,
whose manifest holds hashes, and after a change of what the tensors are called or shaped, no score may differ; and no
score is ever NaN. A damaged file under a name that nothing reads may stay.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.mutations import FILES, as_nobody, change_bytes, change_json, dump
from tests.fuzz.running import Case, Kind
from tests.merge.models import make_adapter, make_base, make_checkpoint
from trsr_dist.merge.inputs import MergeOptions
from trsr_dist.merge.job import merge
from trsr_dist.predict import Ranker, Request

KINDS = ("base", "adapter", "checkpoint")
REQUEST = Request(candidates=("title: Tea", "title: Final in the rain"), items=("title: Stocks", "title: Tennis"))
WEIGHTS = {
    "base": "model.safetensors",
    "adapter": "adapter_model.safetensors",
    "checkpoint": "adapter/adapter_model.safetensors",
}


@dataclass(frozen=True)
class World:
    folder: Path
    scores: dict[str, list[float]]
    """By kind of folder, of the unchanged one."""


def make_world(folder: Path) -> World:
    base = make_base(folder / "base", shard_size="1GB")
    make_adapter(base, folder / "adapter")
    make_checkpoint(base, folder / "checkpoint")
    for path in folder.rglob("*"):  # cases without permissions run as nobody
        path.chmod(0o755 if path.is_dir() else 0o644)
    return World(folder, {kind: scores_of(folder / kind) for kind in KINDS})


def scores_of(folder: Path) -> list[float]:
    ranking = Ranker.open(str(folder), device="cpu").rank(REQUEST)
    return [entry.score for entry in sorted(ranking.candidates, key=lambda entry: entry.index)]


def make(draw: random.Random, folder: Path, world: World) -> Case:
    """One change, then ``predict`` or ``merge``."""
    kind = draw.choice(KINDS)
    changed = folder / kind
    shutil.copytree(world.folder / kind, changed)
    title, is_strict, nobody = draw.choice((_files, _files, _tensors, _extras))(draw, kind, changed)
    is_merged = kind != "base" and draw.random() < 0.4
    found: list[float] = []

    def act() -> None:
        if nobody:
            with as_nobody():
                found.extend(scores_of(changed))
        elif is_merged:
            merge(changed, folder / "merged", MergeOptions())
            found.extend(scores_of(folder / "merged"))
        else:
            found.extend(scores_of(changed))

    def judge(status: int, output: str) -> str:
        if status:
            return "an error, and a merged folder all the same" if (folder / "merged").exists() and not found else ""
        if not all(map(math.isfinite, found)):
            return f"scores {found}"
        wanted = world.scores[kind]
        if (is_strict or kind == "checkpoint") and any(abs(a - b) > 1e-3 for a, b in zip(found, wanted, strict=True)):
            return f"scores {found}, of the unchanged folder {wanted}"
        return ""

    return Case(f"{kind}{' merged' * is_merged}: {title}", act, (kind, str(folder)), judge)


def _files(draw: random.Random, kind: str, folder: Path) -> tuple[str, bool, bool]:
    """Another JSON value, other bytes, or another thing under a file's name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    path = draw.choice([*paths, *(path for path in paths if "config" in path.name)])
    roll = draw.random()
    if path.suffix == ".json" and roll < 0.6:
        value, what = change_json(draw, json.loads(path.read_bytes()))
        path.write_text(dump(value), encoding="utf-8", errors="surrogatepass")
    elif roll < 0.85:
        data, what = change_bytes(draw, path.read_bytes())
        path.write_bytes(data)
    else:
        what = draw.choice(sorted(FILES))
        FILES[what](path)
    return f"{path.relative_to(folder)}: {what}", False, what == "unreadable"


def _tensors(draw: random.Random, kind: str, folder: Path) -> tuple[str, bool, bool]:
    """Tensors of other names, shapes, types or values than a model of this config has."""
    path = folder / WEIGHTS[kind]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    name = draw.choice(sorted(tensors))
    what = draw.choice(sorted(TENSORS))
    TENSORS[what](tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name} {what}", True, False


def _rename(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name.replace("layers", "layerz").replace("weight", "weigth")] = tensors.pop(name)


def _fill(value: float) -> Callable[[dict[str, torch.Tensor], str], None]:
    def change(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name].view(-1)[0] = value

    return change


def _replace(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor], str], None]:
    def replace(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return replace


def _rename_all(tensors: dict[str, torch.Tensor], name: str) -> None:
    for old in list(tensors):
        tensors[f"other.{old}"] = tensors.pop(old)


TENSORS: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "missing": lambda tensors, name: tensors.pop(name),
    "misnamed": _rename,
    "and all others misnamed": _rename_all,
    "with NaN": _fill(float("nan")),
    "with infinity": _fill(float("inf")),
    "cut": _replace(lambda tensor: tensor[:-1]),
    "longer": _replace(lambda tensor: torch.cat([tensor, tensor[:1]])),
    "empty": _replace(lambda tensor: tensor[:0]),
    "with a dimension more": _replace(lambda tensor: tensor.unsqueeze(0)),
    "of whole numbers": _replace(lambda tensor: tensor.to(torch.int32)),
    "of no numbers": _replace(lambda tensor: tensor.to(torch.bool)),
    "beside a stranger": lambda tensors, name: tensors.update({"stranger.weight": torch.ones(2)}),
}


def _extras(draw: random.Random, kind: str, folder: Path) -> tuple[str, bool, bool]:
    """Files that change what the folder is."""
    what = draw.choice(sorted(EXTRAS))
    EXTRAS[what](folder if kind != "checkpoint" else folder / "adapter")
    return what, what != "a template that raises", False


def _config(folder: Path) -> Path:
    return folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "config.json")


def _set(folder: Path, **values: object) -> None:
    path = _config(folder)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def _code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    _set(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")


def _pickle(folder: Path) -> None:
    weights = next(folder.glob("*.safetensors"))
    weights.unlink()
    name = "adapter_model.bin" if weights.name.startswith("adapter") else "pytorch_model.bin"
    (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")


EXTRAS: dict[str, Callable[[Path], object]] = {
    "an adapter's config": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "a model's weights": lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"),
    "an index of other files": lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "b"}}'
    ),
    "a pickle": _pickle,
    "code": _code,
    "a template that raises": lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
    "another peft_type": lambda folder: _set(folder, peft_type="PROMPT_TUNING"),
    "another model_type": lambda folder: _set(folder, model_type="none such"),
    "another rank": lambda folder: _set(folder, r=5, hidden_size=33),
    "modules that are none": lambda folder: _set(folder, target_modules=["nowhere"], num_hidden_layers=0),
    "an unknown setting": lambda folder: _set(
        folder, use_something_new=True, quantization_config={"quant_method": "zzz"}
    ),
}

KIND = Kind("models", 80, 120.0, make_world, make)
