"""From raw files to the files of the store, in pieces that any number of tasks make together.

items        the catalogue
log          units of the log, each cut into parts by user
users        a part of all units: each user once, if the rules admit it, cut again by ranges of the users' hashes
lists        units of the retriever's candidates, if there are any, cut by the same ranges
clicks       of a range: how often its users met each item, and when first
candidates   of a range: its users with their candidates, split by split
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trsr_dist.config import Config
from trsr_dist.config.sections import DataSection
from trsr_dist.data.assembly import (
    CandidateMaker,
    CandidateRules,
    check_times,
    join_split,
    write_items,
    write_split,
)
from trsr_dist.data.candidates import split_by_time, split_by_user
from trsr_dist.data.histories import HistoryRules, admit_all
from trsr_dist.data.interactions import Interactions
from trsr_dist.data.items import REMOVED, CatalogueRules
from trsr_dist.data.jsonl import JsonlReader, Listed
from trsr_dist.data.logs import BITS_OF_A_ROW, LAST, NEVER, ItemCodes, UserColumns, gather, unit_table
from trsr_dist.data.parts import hash64_many, hash_range, part_of_name, read_columns, read_part, write_parts
from trsr_dist.data.retrieved import RetrievedLists, listed_users
from trsr_dist.data.samples import SampleRules, Samples, check_keys, count_clicks
from trsr_dist.data.shared import OrderedError, SharedWork
from trsr_dist.data.source import Counts, Reader
from trsr_dist.data.store import ITEM_SCHEMA, ITEMS, ArrowRows, ArrowWriter, checksums
from trsr_dist.errors import DataError
from trsr_dist.log import get_logger, progress
from trsr_dist.records import UserLog
from trsr_dist.run import SPLITS

ITEM_SPOOL, TABLE, CLICKS = "items.spool", "table.arrow", "clicks.npz"
LARGE_SHARE = 0.05
"""Of unknown items: from here on they are called the cause of an error."""

log = get_logger("data")

Unit = tuple[int, Iterable[UserLog | Interactions]]


@dataclass(frozen=True, slots=True)
class KeptUsers:
    """The users that are kept, in the order of their key's hash."""

    times: np.ndarray
    """int64 [users]."""
    splits: np.ndarray
    """int8 [users], indices into SPLITS."""
    starts: np.ndarray
    """int64 [ranges + 1], of the users of each range."""


class Build:
    """All tasks run the same steps; each makes the pieces that it is the first to take.

    Args:
        config: the settings.
        reader: of the raw files.
        lists: of the retriever's candidates; None: they are drawn.
        work: the pieces.
        num_parts: of the users.
        is_first: this task says what there is to say.
    """

    def __init__(
        self,
        config: Config,
        reader: Reader,
        lists: JsonlReader | None,
        work: SharedWork,
        num_parts: int,
        is_first: bool,
    ) -> None:
        self._config, self._data, self._reader, self._lists = config, config.data, reader, lists
        self._work, self._num_parts, self._is_first = work, num_parts, is_first

    def run(self, fields: tuple[str, ...]) -> None:
        """Return when all pieces are there.

        Args:
            fields: of an item's text.

        Raises:
            DataError: the raw files are wrong, as one task would have met it.
        """
        work = self._work
        work.make("items", lambda: [(0, None)], partial(self._make_items, fields))
        work.check("items")
        self._items = ArrowRows(work.path("items") / ITEM_SPOOL)
        rows = {item: row for row, item in enumerate(self._items.strings("id"))}
        rows |= dict.fromkeys(work.facts("items")["removed"], REMOVED)
        self._num_units = work.make(
            "log", lambda: ((unit[0], unit) for unit in self._reader.units()), partial(self._make_unit, rows)
        )
        work.make("users", self._numbers, self._make_users)
        work.check("log", "users")
        if self._lists is not None:
            lists = self._lists
            self._num_list_units = work.make(
                "lists", lambda: ((unit[0], unit) for unit in lists.candidates()), partial(self._make_lists, rows)
            )
            work.check("lists")
        rows.clear()
        unknown, share = self._unknown()
        try:
            self._kept = self._choose()
            work.make("clicks", self._numbers, self._make_clicks)
            self._make_all_candidates()
        except DataError as error:
            if share < LARGE_SHARE:
                raise
            raise DataError(f"{unknown}, so little is left: {error}") from None

    def write(self, folder: Path) -> dict[str, Any]:
        """Fill the store's folder from the pieces, and return what the manifest tells of it."""
        clicks, first_seen = self._clicks
        known = np.where(first_seen == NEVER, 0, np.maximum(first_seen, 0))
        write_items(folder / ITEMS, self._items, clicks[0].sum(axis=0), known)
        parts = [self._work.path("candidates", number) for number in range(self._num_parts)]
        facts = [self._work.facts("candidates", number) for number in range(self._num_parts)]
        splits = {split: join_split(folder, split, parts, [part[split] for part in facts]) for split in SPLITS}
        counts = self._work.total()
        counts["users_above_max_users"] += self._num_users - len(self._kept.times)
        return {
            "counts": dict(sorted(counts.items())),
            "num_items": len(self._items),
            "splits": splits,
            "files": checksums(folder),
        }

    def _numbers(self) -> Iterable[tuple[int, int]]:
        return ((number, number) for number in range(self._num_parts))

    def _make_items(self, fields: tuple[str, ...], piece: None, folder: Path) -> dict[str, Any]:
        data, counts = self._data, self._work.counts
        rules = CatalogueRules(self._reader.item_file, fields, data.empty_items, data.duplicate_items, counts)
        with ArrowWriter(folder / ITEM_SPOOL, pa.schema(list(ITEM_SCHEMA)[:3])) as writer:
            for item in rules.admit(progress(self._reader.items(), description="items", unit=" items")):
                writer.add(item.id, item.text, item.category)
        return {"removed": [item for item, row in rules.rows.items() if row == REMOVED]}

    def _make_unit(self, rows: Mapping[str, int], unit: Unit, folder: Path) -> dict[str, Any]:
        number, logs = unit
        codes = ItemCodes(rows, keep_unknown=self._data.unknown_items == "fail")
        table, error = unit_table(logs, codes)
        if table is not None:
            part_of = part_of_name(table["user"].combine_chunks(), self._num_parts)
            write_parts(folder / TABLE, table, part_of, self._num_parts)
        if error is not None:
            raise OrderedError(number << BITS_OF_A_ROW | LAST, str(error))
        return {"unknown": codes.unknown}

    def _make_lists(self, rows: Mapping[str, int], unit: tuple[int, Iterator[Listed]], folder: Path) -> None:
        number, listed = unit
        try:
            table = listed_users(listed, rows, self._data.unknown_items, self._work.counts)
        except DataError as error:
            raise OrderedError(number, str(error)) from None
        part_of = hash_range(hash64_many(table["user"].to_pylist()), self._num_parts)
        write_parts(folder / TABLE, table, part_of, self._num_parts)

    def _make_users(self, part: int, folder: Path) -> None:
        data, counts = self._data, self._work.counts
        rules = HistoryRules(data.min_history, data.max_history, data.long_histories, data.repeated_target)
        logs = gather(read_part(self._tables("log", self._num_units), part), self._reader.repeats, counts)
        id_of = self._unknown_id if data.unknown_items == "fail" else None
        users = admit_all(logs, self._reader.log_file, rules, counts, id_of)
        if data.train_prefixes > 1:
            check_keys(users)
        names = users.names.to_pylist()
        found = hash64_many(names)
        table = users.table().append_column("hash", pa.array(found))
        table = table.append_column("split", pa.array(split_by_user(names, data.split)))
        write_parts(folder / TABLE, table, hash_range(found, self._num_parts), self._num_parts)

    def _make_clicks(self, number: int, folder: Path) -> None:
        (users, splits), num_items = self._range(number), len(self._items)
        clicks = count_clicks(users, splits, self._samples(users, splits), num_items)
        first_seen = users.first_seen(num_items)
        met = np.flatnonzero(clicks.any(axis=(0, 1)) | (first_seen < NEVER))  # of a large catalogue few
        np.savez(folder / CLICKS, met=met, clicks=clicks[:, :, met], first_seen=first_seen[met])

    def _make_candidates(self, maker: CandidateMaker, number: int, folder: Path) -> dict[str, Any]:
        maker.retrieved = self._retrieved(number)
        samples, facts = self._samples(*self._range(number)), {}
        for place, split in enumerate(SPLITS):
            own = samples.take(np.flatnonzero(samples.splits == place))
            try:
                facts[split] = write_split(folder, split, own, maker, self._data.max_history, self._work.counts)
            except DataError as error:
                raise OrderedError(place << BITS_OF_A_ROW | number, str(error)) from None
        return facts

    def _tables(self, phase: str, num_pieces: int) -> list[Path]:
        """Of pieces that have one."""
        paths = [self._work.path(phase, number) / TABLE for number in range(num_pieces)]
        return [path for path in paths if path.exists()]

    def _unknown_id(self, code: int) -> str:
        found = (self._work.facts("log", number) or {} for number in range(self._num_units))
        return next(ids[str(code)] for facts in found if str(code) in (ids := facts.get("unknown", {})))

    def _samples(self, users: UserColumns, splits: np.ndarray) -> Samples:
        data = self._data
        return Samples.of(users, splits, SampleRules(data.train_targets, data.train_prefixes, data.min_history))

    def _range(self, number: int) -> tuple[UserColumns, np.ndarray]:
        """The kept users of a range, in the order of their key's hash, and their splits."""
        start, stop = self._kept.starts[number : number + 2]
        batches, splits = read_part(self._tables("users", self._num_parts), number), self._kept.splits[start:stop]
        order = np.argsort(np.concatenate([batch.column("hash").to_numpy() for batch in batches]), kind="stable")
        return UserColumns.from_arrow(batches).take(order[: stop - start]), splits

    def _choose(self) -> KeptUsers:
        """Keep the first ``max_users`` by their key's hash (0: all), and split them."""
        data, names = self._data, ("hash", "time", "split")
        tables = (read_columns(path, names) for path in self._tables("users", self._num_parts))
        keys, times, splits = map(np.concatenate, zip(*tables, strict=True))
        self._num_users = len(keys)
        if not self._num_users:
            left_out = describe(self._work.total())
            raise DataError(
                f"{self._reader.log_file}: no user is left ({left_out}); widen data.min_history and the like"
            )
        kept = min(data.max_users or self._num_users, self._num_users)
        ends = np.append(0, np.cumsum(np.bincount(hash_range(keys, self._num_parts), minlength=self._num_parts)))
        order = np.argsort(keys, kind="stable")[:kept]
        keys, times, splits = keys[order], times[order], splits[order]
        if data.split_by == "time":
            check_times(times, "data.split_by=time")
            splits = split_by_time(times, keys, data.split)
        return KeptUsers(times, splits, np.minimum(ends, kept))

    def _retrieved(self, number: int) -> RetrievedLists | None:
        """Lists of the users of a range."""
        if self._lists is None:
            return None
        path, batches = self._lists.log_file, read_part(self._tables("lists", self._num_list_units), number)
        try:
            return RetrievedLists(path, batches, self._data.missed_targets, partial(self._items.value, 0))
        except DataError as error:
            raise OrderedError(number - LAST, str(error)) from None  # before what is wrong with a user of any split

    def _unknown(self) -> tuple[str, float]:
        """What there is to say about unknown items, and their share."""
        counts = self._work.total()
        if not (missing := counts["clicks_on_unknown_items"]):
            return "", 0.0
        share = missing / (read := counts["item_ids_read"])
        what = f"{missing} of {read} item ids ({share:.1%}) are not in {self._reader.item_file.name}"
        if self._is_first:
            log.warning("%s: %s; they are left out (data.unknown_items=skip)", self._reader.log_file, what)
        return f"{self._reader.log_file}: {what}", share

    def _make_all_candidates(self) -> None:
        num_items = len(self._items)
        clicks, first_seen = np.zeros((len(SPLITS), 2, num_items), np.int64), np.full(num_items, NEVER)
        for number in range(self._num_parts):
            part = np.load(self._work.path("clicks", number) / CLICKS)
            met = part["met"]
            clicks[:, :, met] += part["clicks"]
            first_seen[met] = np.minimum(first_seen[met], part["first_seen"])
        self._clicks = clicks, first_seen
        maker = CandidateMaker(candidate_rules(self._config), self._kept.times, clicks, self._items, first_seen)
        self._work.make("candidates", self._numbers, partial(self._make_candidates, maker))
        self._work.check("candidates")


def candidate_rules(config: Config) -> CandidateRules:
    """How candidate lists are made."""
    data = config.data
    return CandidateRules(
        strategy=data.candidates,
        within_category=data.candidates == "category" or holds_locales(data),
        seen_before_target=data.seen_before_target,
        split_by=data.split_by,
        too_few_negatives=data.too_few_negatives,
        pool_size=config.train.pool_size,
        train_negatives=config.train.negatives_per_positive,
        evaluation_negatives=config.evaluate.negatives_per_positive,
        seed=config.run.seed,
    )


def describe(counts: Counts) -> str:
    """The counts in one line, without zeros."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()) if count)


def holds_locales(data: DataSection) -> bool:
    """Whether the catalogue holds several locales, an item's category being its own: a user's negatives then come from
    the user's locale, or language alone would tell them from the positives."""
    return data.format == "amazon_m2" and not data.locale
