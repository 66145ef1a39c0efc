"""Files that hold one array of numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SMALL_BYTES = 1 << 19


def open_array(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file's values, read-only; a small file is read, since a mapping would hold one of the process's few files.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is empty, or its size is not that of whole values.
    """
    if path.stat().st_size > SMALL_BYTES:
        return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)
    content = path.read_bytes()
    if not content:
        raise ValueError("empty")
    return np.frombuffer(content, dtype=dtype)
