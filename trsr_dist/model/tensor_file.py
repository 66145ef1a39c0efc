"""Writes safetensors files."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write contiguous tensors as one safetensors file, as PyTorch's (``format: pt``).

    Raises:
        OSError: as of any other file. The library hides what the system said in its own type.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        found = re.search(r"(.*) \(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[2]), found[1], str(path)) from None
