"""The weight files of a model folder: which ones count, what they hold, reading and laying them out tensor by tensor.

Nothing is mapped into memory. Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import NonNegativeInt
from typing_extensions import TypedDict

from trsr_dist.errors import DataError, ModelError
from trsr_dist.files import explain, plain, read_json
from trsr_dist.json_text import SHOWN_CHARACTERS, parse_json

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
PICKLES = ("*.bin", "*.pt", "*.pth")
PICKLE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError, EOFError, UnpicklingError)
"""What damaged pickles raise."""
COMPARED_ELEMENTS = 2**20
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
        """
        Raises:
            ModelError: it is none that arithmetic is done in, as in quantized models.
        """
        if self.code not in DTYPES:
            raise ModelError(
                f"{self.file}: {self.name} has dtype {self.code}, which is no plain floating or integer type; name the "
                "unquantized model"
            )
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

    def row(self, number: int) -> TensorEntry:
        """One row alone."""
        return replace(self, shape=(1, *self.shape[1:]), start=self.start + number * self.row_bytes)


def file_entries(path: Path) -> list[TensorEntry]:
    """Tensors of one file, in the order of their bytes.

    Raises:
        ModelError: the file is missing, unreadable, truncated or not in this format, or sizes and shapes disagree.
    """
    header, data, size = _read_header(path)
    entries, end = [], data
    for name, facts in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        first, last = facts["data_offsets"]
        entry = TensorEntry(name, path, facts["dtype"], tuple(facts["shape"]), data + first)
        if entry.start != end or (entry.code in DTYPES and entry.num_bytes != last - first):
            raise ModelError(f"{path}: {name} of shape {facts['shape']} has bytes {first} to {last}: damaged header")
        entries.append(entry)
        end = data + last
    if size != end:
        raise ModelError(f"{path}: {size} bytes, its header promises {end}: truncated; copy it again")
    return entries


def _read_header(path: Path) -> tuple[dict[str, TensorFacts], int, int]:
    """A file's header, the offset at which its data begins, and the file's size."""
    try:
        with open(path, "rb", opener=plain) as stream:
            size = os.fstat(stream.fileno()).st_size
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, MAX_HEADER_BYTES):
                raise ModelError(f"{path}: header of {length} bytes in a file of {size}: truncated; copy it again")
            header = parse_json(stream.read(length), dict[str, TensorFacts | dict[str, str]])
            header.pop("__metadata__", None)
            for name, facts in header.items():
                if not isinstance(facts.get("data_offsets"), tuple):
                    raise DataError(f"{name} is {str(facts)[:SHOWN_CHARACTERS]}")
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; the model's weights are incomplete, copy the folder again") from None
    except OSError as error:
        raise ModelError(str(explain(error, path))) from None
    except (struct.error, DataError) as error:
        raise ModelError(f"{path}: not a safetensors file, or truncated; copy it again ({error})") from None
    return header, 8 + length, size


def folder_files(folder: Path) -> list[Path]:
    """Weight files of a Hugging Face folder: those that transformers reads, in the order of their names.

    Raises:
        ModelError: the folder has no safetensors weights.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    found = f"{pickles[0]}, a pickle, which can run code when it is read; " if pickles else ""
    raise ModelError(
        f"{folder}: no weights ({SINGLE} or {INDEX}); {found}only safetensors weights are read: name a complete model "
        "folder. Convert other formats where you trust them: load the model with transformers, then save_pretrained"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    """File name by tensor name, as the index tells it."""
    try:
        files = read_json(folder / INDEX, WeightIndex)["weight_map"]
    except DataError as error:
        raise ModelError(str(error)) from None
    if any(Path(name).name != name for name in files.values()):
        raise ModelError(f"{folder / INDEX}: names files outside its folder; copy the model again")
    return files


def has_weights(folder: Path) -> bool:
    """Whether there are safetensors of a model; not of an adapter."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def folder_entries(folder: Path) -> list[list[TensorEntry]]:
    """Tensors of a Hugging Face folder, by file.

    Raises:
        ModelError: a file is damaged, or files, index and tensors do not fit together.
    """
    by_file = [file_entries(path) for path in folder_files(folder)]
    found = {entry.name: entry.file.name for entries in by_file for entry in entries}
    if sum(map(len, by_file)) != len(found):
        raise ModelError(f"{folder}: a tensor is in two files; copy the model again")
    if not (folder / SINGLE).is_file():
        for name in sorted(_weight_map(folder).keys() ^ found.keys()):
            raise ModelError(f"{folder}: {name} is in {INDEX} or in the files, not in both; copy the model again")
    return by_file


def named_entries(folder: Path) -> dict[str, TensorEntry]:
    """Tensors of a Hugging Face folder by name; raises as ``folder_entries``."""
    return {entry.name: entry for entries in folder_entries(folder) for entry in entries}


def is_equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors have the same values; their dtypes may differ."""
    if one.shape != other.shape:
        return False
    pairs = zip(read_rows(one, COMPARED_ELEMENTS), read_rows(other, COMPARED_ELEMENTS), strict=True)
    return all(torch.equal(rows.double(), others.double()) for (_, rows), (_, others) in pairs)


def pickle_fault(error: Exception) -> str:
    """Why a pickle of tensors cannot be read, in one line."""
    if isinstance(error, UnpicklingError) and re.search("GLOBAL|Unsupported", str(error)):
        return "it holds code, which is not run"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
            raise ModelError(f"{entry.file}: ends within {entry.name}: truncated; copy it again")
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
