"""Made logs in the shape of MINDlarge: its numbers of users, rows, news and bytes, at any share of them.

MINDlarge's train part (Wu et al., ACL 2020): 711,222 users in 2,232,748 rows, 101,527 news, histories of 33 clicks on
average and 37 impressions a row. Equal arguments give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_USERS, NUM_ROWS, NUM_NEWS = 711_000, 2_230_000, 101_000
MEAN_HISTORY, MOST_HISTORY, MEAN_SHOWN = 32, 400, 33
STRIDE = 7919
"""Of the users from row to row, so that a user's rows lie apart."""
DAY = 86400
FIRST_DAY, NUM_DAYS = 9, 6
"""Of November 2019."""
START = 1_573_257_600
"""Unix seconds of the first day."""
WORDS = tuple(first + last for first in ("ta", "ren", "mi", "os", "el", "ku") for last in ("lo", "ver", "sin", "ga"))


class MadeLog:
    """Users with their clicks and times.

    Args:
        share: of MINDlarge's users and rows. There are as many news as there, or a seventh of the users' number.
    """

    def __init__(self, share: float) -> None:
        self.num_users, self.num_rows = max(100, round(NUM_USERS * share)), max(300, round(NUM_ROWS * share))
        self.num_news = min(NUM_NEWS, max(1000, self.num_users // 7))
        stream = np.random.default_rng(0)
        self.lengths = np.minimum(stream.geometric(1 / MEAN_HISTORY, self.num_users) + 1, min(MOST_HISTORY, 900))
        self._starts = stream.integers(0, self.num_news, self.num_users)
        self._times = stream.integers(0, NUM_DAYS * DAY, self.num_rows)
        self._num_shown = stream.poisson(MEAN_SHOWN, self.num_rows) + 1
        order = stream.permutation(self.num_news)
        ids = [f"N{1000 + number}" for number in order.tolist()]
        self._ring = ids + ids[: MOST_HISTORY + 1]
        """A user's clicks are neighbours here: different items, other ones for each user."""

    def clicks(self, user: int) -> list[str]:
        """Item ids, oldest first."""
        start = int(self._starts[user])
        return self._ring[start : start + int(self.lengths[user])]

    def write_mind(self, folder: Path) -> None:
        """news.tsv and behaviors.tsv."""
        with open(folder / "news.tsv", "w", encoding="utf-8") as stream:
            for number in range(self.num_news):
                words = [WORDS[number // 24**place % 24] for place in range(3)] * 3
                cells = (f"N{1000 + number}", words[0], words[1], " ".join(words), " ".join(words * 5), "", "[]", "[]")
                stream.write("\t".join(cells) + "\n")
        with open(folder / "behaviors.tsv", "w", encoding="utf-8") as stream:
            stream.writelines(self._rows())

    def _rows(self) -> Iterator[str]:
        shown = [f"{item}-{int(place % 20 == 0)}" for place, item in enumerate(self._ring)]
        for row, (second, num_shown) in enumerate(zip(self._times.tolist(), self._num_shown.tolist(), strict=True)):
            user, first = row * STRIDE % self.num_users, row % self.num_news
            hour, minute = second % DAY // 3600, second % 3600 // 60
            clock = f"{(hour + 11) % 12 + 1}:{minute:02d}:{second % 60:02d} {'AM' if hour < 12 else 'PM'}"
            cells = " ".join(self.clicks(user)), " ".join(shown[first : first + num_shown])
            yield f"{row + 1}\tU{user}\t11/{FIRST_DAY + second // DAY}/2019 {clock}\t{cells[0]}\t{cells[1]}\n"

    def write_interactions(self, folder: Path, ending: str) -> int:
        """items.jsonl and interactions, one row a click, users' clicks interleaved; returns the number of them.

        Args:
            folder: takes the files.
            ending: ``.jsonl`` or ``.parquet``.
        """
        with open(folder / "items.jsonl", "w", encoding="utf-8") as stream:
            for number in range(self.num_news):
                stream.write(json.dumps({"id": f"N{1000 + number}", "text": f"{WORDS[number % 24]} {number}"}) + "\n")
        write = self._write_parquet if ending == ".parquet" else self._write_json
        write(folder / f"interactions{ending}")
        return int(self.lengths.sum())

    def _interactions(self) -> Iterator[tuple[list[str], list[str], list[int]]]:
        """Users, items and times of single clicks, by time."""
        owners = np.repeat(np.arange(self.num_users, dtype=np.int32), self.lengths)
        places = np.arange(len(owners)) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)
        order, ring = np.argsort(places * 3600 + owners % 3600, kind="stable"), np.array(self._ring, object)
        for start in range(0, len(order), 1 << 20):
            rows = order[start : start + (1 << 20)]
            users, times = owners[rows], START + places[rows] * 3600 + owners[rows] % 3600
            items = ring[self._starts[users] + places[rows]]
            yield [f"U{user}" for user in users.tolist()], items.tolist(), times.tolist()

    def _write_json(self, path: Path) -> None:
        with open(path, "w", encoding="utf-8") as stream:
            for columns in self._interactions():
                found = zip(*columns, strict=True)
                stream.writelines(
                    f'{{"user": "{user}", "item": "{item}", "time": {time}}}\n' for user, item, time in found
                )

    def _write_parquet(self, path: Path) -> None:
        schema = pa.schema([("user", pa.string()), ("item", pa.string()), ("time", pa.int64())])
        with pq.ParquetWriter(path, schema) as writer:
            for columns in self._interactions():
                writer.write_table(pa.table(list(columns), schema=schema))
