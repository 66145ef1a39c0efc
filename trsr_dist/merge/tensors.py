"""Reading and laying out safetensors files tensor by tensor, without mapping them into memory.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from trsr_dist.errors import DataError, ModelError
from trsr_dist.files import read_json
from trsr_dist.json_text import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorFacts(TypedDict):
    """What a header says of a tensor."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class WeightIndex(TypedDict):
    """Files of a folder's tensors."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie."""

    name: str
    file: Path
    code: str
    """The format's name of the dtype, such as BF16."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file and the offset at which its data begins.

    Raises:
        ModelError: the file is missing, truncated or not in this format.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ModelError(f"{path}: header of {length} bytes in a file of {size}: truncated; copy it anew")
            return parse_json(stream.read(length), dict[str, TensorFacts | dict[str, str]]), 8 + length
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; the model folder is incomplete, copy it anew") from None
    except (struct.error, DataError):
        raise ModelError(f"{path}: not a safetensors file, or truncated; copy it anew") from None


def file_entries(path: Path) -> list[TensorEntry]:
    """Tensors of one file, in the order of their bytes.

    Raises:
        ModelError: the file is truncated, or a tensor's size and shape disagree.
    """
    header, data = read_header(path)
    entries, end = [], data
    described = [(name, value) for name, value in header.items() if name != "__metadata__"]
    for name, value in sorted(described, key=lambda pair: pair[1]["data_offsets"]):
        if value["dtype"] not in DTYPES:
            raise ModelError(
                f"{path}: {name} has dtype {value['dtype']}, which is no plain floating or integer type; "
                "merge into the unquantized base"
            )
        first, last = value["data_offsets"]
        entry = TensorEntry(name, path, value["dtype"], tuple(value["shape"]), data + first)
        if entry.num_bytes != last - first or entry.start != end:
            raise ModelError(f"{path}: {name} of shape {value['shape']} has bytes {first} to {last}: damaged header")
        entries.append(entry)
        end = data + last
    if path.stat().st_size != end:
        raise ModelError(f"{path}: {path.stat().st_size} bytes, its header promises {end}: truncated; copy it anew")
    return entries


def folder_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face folder, in the order of their names.

    Raises:
        ModelError: the folder has no safetensors weights.
    """
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(read_json(folder / INDEX, WeightIndex)["weight_map"].values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ModelError(
        f"{folder}: neither {INDEX} nor {SINGLE}; only safetensors weights can be streamed. Convert others by "
        "loading them with transformers and save_pretrained"
    )


def folder_entries(folder: Path) -> list[list[TensorEntry]]:
    """Tensors of a Hugging Face folder, by file.

    Raises:
        ModelError: files, index and tensors do not fit together.
    """
    by_file = [file_entries(path) for path in folder_files(folder)]
    found = {entry.name: entry.file.name for entries in by_file for entry in entries}
    if sum(map(len, by_file)) != len(found):
        raise ModelError(f"{folder}: a tensor is in two files; copy the model anew")
    if (folder / INDEX).is_file():
        promised = read_json(folder / INDEX, WeightIndex)["weight_map"]
        for name in sorted(promised.keys() ^ found.keys()):
            raise ModelError(f"{folder}: {name} is in {INDEX} or in the files, not in both; copy the model anew")
    return by_file


def read_rows(entry: TensorEntry, max_elements: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Blocks of whole rows, at most ``max_elements`` each (one row at least): (first row, tensor [rows, columns]).

    Raises:
        ModelError: the file ends early.
    """
    columns = prod(entry.shape[1:])
    step = max(1, max_elements // max(1, columns))
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.start)
        for first in range(0, entry.num_rows, step):
            rows = min(step, entry.num_rows - first)
            if not entry.row_bytes:
                return
            buffer = bytearray(rows * entry.row_bytes)
            _fill(stream, buffer, entry)
            yield first, torch.frombuffer(buffer, dtype=entry.dtype).view(rows, columns)


def _fill(stream: Any, buffer: bytearray, entry: TensorEntry) -> None:
    view = memoryview(buffer)
    while view:
        count = stream.readinto(view)
        if not count:
            raise ModelError(f"{entry.file}: ends within {entry.name}: truncated; copy it anew")
        view = view[count:]


def header_bytes(entries: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Header of a file with tensors (name, dtype code, shape) in this order, padded as the library pads it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, code, shape in entries:
        size = prod(shape) * DTYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
