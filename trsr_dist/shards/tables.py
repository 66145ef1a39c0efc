"""A number for every candidate of a split, beside its shards: what a model says of it, or whether it may be drawn.

One row a sample, one column a candidate, in the shards' order, memory-mapped; valid for these shards alone. The tars
are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trsr_dist.errors import DataError, RunError
from trsr_dist.files import atomic_file, sha256_of
from trsr_dist.hashing import digest
from trsr_dist.run import MANIFEST, check_inputs, manifest_hash, read_manifest, write_manifest

TABLE = "table.npy"
SCORES = "scores"
"""What names of folders with a model's scores begin with."""
MINED = "mined"
"""Folder of the table that says which negatives tools/mine_negatives.py has left in the pool."""


@dataclass(frozen=True, slots=True)
class CandidateTable:
    """An opened table."""

    values: np.ndarray
    """Shape (num_samples, most candidates of a sample); what a sample has no candidate for is NaN or False."""
    sha256: str
    """Of the values' file."""
    manifest: dict[str, Any]


def scores_folder(split: Path, model: str) -> Path:
    """Where the scores of a model lie, named by it (``model_identity``) and the split's manifest."""
    return split / f"{SCORES}-{digest(model)[:12]}-{manifest_hash(split)[:12]}"


def write_table(
    folder: Path, rows: Sequence[np.ndarray], shards_hash: str, stage: str, settings: dict[str, Any], **facts: Any
) -> None:
    """Publish a table; its manifest, which is written last, makes it complete.

    Args:
        folder: of the table.
        rows: float32 or bool, of each sample in order one value a candidate.
        shards_hash: of the split's manifest.
        stage: that computed them.
        settings: what the values depend on beside the shards.
        **facts: kept in the manifest.
    """
    kind = rows[0].dtype
    values = np.full((len(rows), max(map(len, rows))), np.nan if kind == np.float32 else False, dtype=kind)
    for row, found in zip(values, rows, strict=True):
        row[: len(found)] = found
    (folder / MANIFEST).unlink(missing_ok=True)
    with atomic_file(folder / TABLE, "wb") as stream:
        np.save(stream, values)
    write_manifest(folder, stage, settings, {"shards": shards_hash}, sha256=sha256_of(folder / TABLE), **facts)


def open_table(folder: Path, shards_hash: str, remedy: str) -> CandidateTable:
    """The table of a folder.

    Args:
        folder: that ``write_table`` filled.
        shards_hash: of the split's manifest, which must be the table's.
        remedy: what makes the table.

    Raises:
        RunError: it is missing or incomplete, or belongs to other shards.
        DataError: it is damaged.
    """
    if not (folder / MANIFEST).is_file():
        beside = sorted(path.parent.name for path in folder.parent.glob(f"{folder.name.partition('-')[0]}*/{MANIFEST}"))
        others = f" (complete there: {', '.join(beside)})" if beside else ""
        raise RunError(f"{folder}: not there, or not complete{others}; {remedy}")
    check_inputs(folder, {"shards": shards_hash}, remedy)
    manifest, path = read_manifest(folder), folder / TABLE
    sha256 = sha256_of(path) if path.is_file() else ""
    if sha256 != manifest.get("sha256"):
        raise DataError(f"{path}: missing, or its bytes are not those of the manifest; {remedy} --force")
    return CandidateTable(np.load(path, mmap_mode="r"), sha256, manifest)
