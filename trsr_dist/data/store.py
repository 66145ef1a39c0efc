"""The prepared data on disk: Arrow files, memory-mapped, so that opening them costs neither time nor memory.

items.arrow                    id, text, category, popularity, first_seen
{train,valid,test}.arrow       user, history, candidates, labels, time
manifest.json                  settings, input hashes, counts, candidate hashes, SHA-256 of the files
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trsr_dist.errors import DataError
from trsr_dist.files import remedy_of, sha256_of
from trsr_dist.records import Candidate, Item
from trsr_dist.run import MANIFEST, SPLITS, manifest_hash, read_manifest

ROWS_PER_BATCH = 4096
KEPT_BATCHES = 4
"""Whose names and times are in memory as Python values."""
KEPT_ITEMS = 65_536
"""That are in memory as Python values, the last ones read."""
ITEMS = "items.arrow"
PREFIXES = "train_prefixes"
"""In the manifest's settings, where train users have more than one sample."""
EARLIER = r"~[0-9]+$"
"""How the keys of such samples end, but for each user's latest one."""
REMEDY = "run tools/prepare_data.py --force"
POOLS = "pools"
"""In the manifest's settings, where the negatives of every strategy have the target's category."""
ITEM_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("category", pa.string()),
        ("popularity", pa.int64()),
        ("first_seen", pa.int64()),
    ]
)
USER_SCHEMA = pa.schema(
    [
        ("user", pa.string()),
        ("history", pa.list_(pa.int32())),
        ("candidates", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int8())),
        ("time", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class UserRow:
    """A sample of a user of a split; items are rows of the catalogue."""

    user: str
    history: list[int]
    """Oldest first, before the target."""
    candidates: list[int]
    """Valid and test: the fixed list, shuffled. Train: the targets, then the pool of negatives."""
    labels: list[int]
    """1 for a target, 0 for a negative."""
    time: int
    """Unix seconds of the target, 0 where unknown."""


class ArrowWriter:
    """Writes an uncompressed Arrow file in batches of equal size; the last may be shorter."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._columns: list[list] = [[] for _ in schema]
        self._table = schema.empty_table()
        self._writer = pa.ipc.new_file(str(path), schema)

    def __enter__(self) -> ArrowWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._columns[0]:
            self._flush()
        if kind is None and len(self._table):
            self._write(self._table)
        self._writer.close()

    def add(self, *values: object) -> None:
        """Append one row, values in the schema's order."""
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        if len(self._columns[0]) == ROWS_PER_BATCH:
            self._flush()

    def add_batch(self, columns: list[pa.Array]) -> None:
        """Append whole columns as one batch."""
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def add_columns(self, columns: list[pa.Array]) -> None:
        """Append columns of any length."""
        self._table = pa.concat_tables([self._table, pa.table(columns, schema=self._schema)])
        while len(self._table) >= ROWS_PER_BATCH:
            self._write(self._table.slice(0, ROWS_PER_BATCH))
            self._table = self._table.slice(ROWS_PER_BATCH)

    def _write(self, table: pa.Table) -> None:
        self.add_batch(table.combine_chunks().to_batches()[0].columns)

    def _flush(self) -> None:
        arrays = [pa.array(c, field.type) for c, field in zip(self._columns, self._schema, strict=True)]
        self.add_batch(arrays)
        self._columns = [[] for _ in self._schema]


class ArrowRows:
    """Random access to the rows of a file that ``ArrowWriter`` wrote.

    Raises:
        DataError: the file is missing, unreadable or not an Arrow file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._source = pa.memory_map(str(path))
            self._reader = pa.ipc.open_file(self._source)
            self.batches: list[pa.RecordBatch] = [
                self._reader.get_batch(i) for i in range(self._reader.num_record_batches)
            ]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: not a complete Arrow file ({error}); {REMEDY}") from None
        self._length = sum(batch.num_rows for batch in self.batches)
        self._columns = lru_cache(KEPT_BATCHES)(self._batch_columns)

    def __len__(self) -> int:
        return self._length

    def value(self, column: int, row: int) -> object:
        """One cell as a Python value."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        return self.batches[row // ROWS_PER_BATCH].column(column)[row % ROWS_PER_BATCH].as_py()

    def row(self, row: int) -> list:
        """The cells of a row as Python values; cheap where rows of a batch are read one after the other."""
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        batch, place = divmod(row, ROWS_PER_BATCH)
        return [
            values[place] if ends is None else values[ends[place] : ends[place + 1]].tolist()
            for values, ends in self._columns(batch)
        ]

    def _batch_columns(self, batch: int) -> list[tuple[Any, np.ndarray | None]]:
        """Of each column of a batch the values and, of lists, where each begins."""
        found: list[tuple[Any, np.ndarray | None]] = []
        for column in self.batches[batch].columns:
            if pa.types.is_list(column.type):
                found.append((column.values.to_numpy(), column.offsets.to_numpy()))
            else:
                found.append((column.to_pylist(), None))
        return found

    def column(self, name: str) -> np.ndarray:
        """A numeric column as one array."""
        parts = [batch.column(name).to_numpy() for batch in self.batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def strings(self, name: str) -> list[str]:
        """A text column."""
        return [text for batch in self.batches for text in batch.column(name).to_pylist()]


class Catalogue(ArrowRows):
    """The items, by row."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.item: Callable[[int], Item] = lru_cache(KEPT_ITEMS)(
            lambda row: Item(self.id(row), self.text(row), self.category(row))
        )

    @cached_property
    def ids(self) -> list[str]:
        """Of all items, in memory; for those who need the ids of many."""
        return self.strings("id")

    def id(self, row: int) -> str:
        return self.value(0, row)

    def text(self, row: int) -> str:
        return self.value(1, row)

    def category(self, row: int) -> str:
        return self.value(2, row)

    def numbers(self) -> dict[str, tuple[int, int]]:
        """Of every item, by its id: popularity, and Unix seconds at which the first user is known to have met it (0
        where nobody did, or without times)."""
        values = zip(self.column("popularity").tolist(), self.column("first_seen").tolist(), strict=True)
        return dict(zip(self.strings("id"), values, strict=True))


class HistoryStore:
    """What ``prepare`` wrote. Users of a split stand in the order of their key's hash, the earlier samples of train
    users (``data.train_prefixes``) among them.

    Args:
        folder: ``RUN/histories``.
        check: compare the files with their checksums, which reads them once. Without it damage may go unseen: for
            estimates, and where another rank has checked.

    Raises:
        RunError: the folder has no manifest.
        DataError: a file is missing or damaged.
    """

    def __init__(self, folder: str | Path, check: bool = True) -> None:
        folder = Path(folder)
        self.manifest_hash = manifest_hash(folder)
        if check:
            check_files(folder)
        settings = read_manifest(folder).get("settings", {})
        self.within_category = POOLS in settings
        """Negatives of every strategy have the target's category."""
        self.has_earlier = PREFIXES in settings
        """Train users have several samples."""
        self.catalogue = Catalogue(folder / ITEMS)
        self._users = {split: ArrowRows(folder / f"{split}.arrow") for split in SPLITS}

    def num_users(self, split: str) -> int:
        """Samples of a split: of a user one, of train users up to ``data.train_prefixes``."""
        return len(self._users[split])

    def names(self, split: str) -> Iterator[str]:
        """Of all samples of a split, in order."""
        return (user for batch in self._users[split].batches for user in batch.column("user").to_pylist())

    def count_items(self, split: str, column: str) -> np.ndarray:
        """int64 [items]: how often each item stands in the split's histories, or is among its ``targets``. Of a user's
        samples the latest counts, as for ``sequences``."""
        total = np.zeros(len(self.catalogue), np.int64)
        for batch in self._latest(split):
            items = _targets(batch)[0] if column == "targets" else batch.column("history").flatten().to_numpy()
            total += np.bincount(items, minlength=len(total))
        return total

    def sequences(self, split: str, max_items: int) -> list[np.ndarray]:
        """Of each user the latest items, int32 [at most ``max_items``], oldest first, the targets last."""
        found = []
        for batch in self._latest(split):
            (targets, counts), histories = _targets(batch), batch.column("history")
            parts = np.split(targets, np.cumsum(counts)[:-1])
            items, lengths = histories.flatten().to_numpy(), histories.value_lengths().to_numpy()
            for history, target in zip(np.split(items, np.cumsum(lengths)[:-1]), parts, strict=True):
                found.append(np.concatenate([history, target])[-max_items:])
        return found

    def _latest(self, split: str) -> Iterator[pa.RecordBatch]:
        """The users, each once."""
        for batch in self._users[split].batches:
            if split == "train" and self.has_earlier:
                batch = batch.filter(pc.invert(pc.match_substring_regex(batch.column("user"), EARLIER)))
            if batch.num_rows:
                yield batch

    def user(self, split: str, index: int) -> UserRow:
        return UserRow(*self._users[split].row(index))

    def first_users(self, split: str, most: int) -> list[list[UserRow]]:
        """The samples of each of the split's first users."""
        if split != "train" or not self.has_earlier:
            return [[self.user(split, index)] for index in range(min(most, self.num_users(split)))]
        latest = (name for name in self.names(split) if not re.search(EARLIER, name))
        found: dict[str, list[UserRow]] = {name: [] for name in islice(latest, most)}
        for index, name in enumerate(self.names(split)):
            if (user := re.sub(EARLIER, "", name)) in found:
                found[user].append(self.user(split, index))
        return list(found.values())

    def candidates(self, row: UserRow) -> tuple[Candidate, ...]:
        """A row's candidates, as text."""
        items = map(self.catalogue.item, row.candidates)
        return tuple(Candidate(item.id, item.text, label) for item, label in zip(items, row.labels, strict=True))


def _targets(batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Targets of the batch's users, int32, one after the other, and how many each user has, int64 [users]."""
    candidates = batch.column("candidates")
    owners = np.repeat(np.arange(len(candidates)), candidates.value_lengths().to_numpy())
    is_target = batch.column("labels").flatten().to_numpy() > 0
    return candidates.flatten().to_numpy()[is_target], np.bincount(owners[is_target], minlength=len(candidates))


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a store, by name.

    Raises:
        DataError: one is missing or unreadable.
    """
    found = {}
    for path in (folder / ITEMS, *(folder / f"{split}.arrow" for split in SPLITS)):
        try:
            found[path.name] = sha256_of(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy_of(error, path, REMEDY)}") from None
    return found


def check_files(folder: Path) -> None:
    """Compare a store's files with the checksums of its manifest.

    Raises:
        DataError: one is missing or has changed, or the manifest has no checksums.
    """
    recorded = read_manifest(folder).get("files")
    if not isinstance(recorded, dict):
        raise DataError(f"{folder / MANIFEST}: has no checksums of the files (made by an earlier version?); {REMEDY}")
    for name, found in checksums(folder).items():
        if recorded.get(name) != found:
            raise DataError(
                f"{folder / name}: damaged: its SHA-256 is {found[:12]}..., when it was written it was "
                f"{str(recorded.get(name))[:12]}...; {REMEDY}"
            )
