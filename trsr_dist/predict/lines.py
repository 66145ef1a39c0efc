"""Requests and rankings as JSON lines.

in   {"id": "u1", "items": ["title: Tea", ...], "candidates": ["title: Teapot", {"id": "c2", "text": "title: Tyre"}]}
     or "summary": "..." for a ready one, with or without items; "id" is optional
out  {"id": "u1", "summary": "...", "ranked": [{"index": 0, "text": "title: Teapot", "score": 1.87}, ...]}
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice, tee
from pathlib import Path
from typing import IO, Any

from trsr_dist.errors import DataError
from trsr_dist.files import atomic_file, numbered_lines, resumable_file, sha256_of
from trsr_dist.hashing import digest
from trsr_dist.json_text import parse_json
from trsr_dist.log import get_logger, progress
from trsr_dist.predict.ranker import Ranker, Ranking, Request
from trsr_dist.words import has_text

FIELDS = ("id", "items", "summary", "candidates")
SHOWN = 5
"""Bad lines that an error names."""

log = get_logger("predict")


@dataclass(frozen=True, slots=True)
class Line:
    """A request of a file."""

    request: Request
    name: Any
    """Its id, as it was given; the line's number where there is none."""
    ids: tuple[Any, ...]
    """Of the candidates; None where a candidate has none."""


def predict_lines(ranker: Ranker, source: Path, target: Path, skip_bad: bool) -> int:
    """Rank every line of ``source`` into ``target``, which appears whole; returns the number of rankings.

    What a server has ranked before it failed is kept, and the next call goes on from there.

    Raises:
        DataError: a request cannot be ranked.
        EngineError: a server fails.
    """
    if ranker.server is None:
        with atomic_file(target) as stream:
            return write_rankings(ranker, read_lines(source, skip_bad), stream)
    decisive = [sha256_of(source), skip_bad, ranker.server.identity, ranker.builder.fingerprint, ranker.domain]
    with resumable_file(target, digest([*decisive, asdict(ranker.history)])) as (stream, num_done):
        if num_done:
            log.info("going on behind the %d rankings of an earlier call (%s)", num_done, stream.name)
        lines = islice(read_lines(source, skip_bad), num_done, None)
        return num_done + write_rankings(ranker, lines, stream)


def write_rankings(ranker: Ranker, lines: Iterator[Line], stream: IO[str]) -> int:
    """Rank lines in their order; returns how many."""
    asked, lines = tee(lines)
    rankings, count = ranker.rank_many(line.request for line in asked), 0
    for ranking in progress(rankings, description="predict", unit="user"):
        stream.write(json.dumps(answer(next(lines), ranking), ensure_ascii=False) + "\n")
        count += 1
    return count


def check_lines(source: Path) -> None:
    """Look at every line before a model is loaded.

    Raises:
        DataError: names the first bad lines and how many there are.
    """
    problems = [problem for _, problem in parse_lines(source) if problem]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError(f"{'; '.join(problems[:SHOWN])}{more}; correct them, or leave them out with --skip-bad-lines")


def read_lines(source: Path, skip_bad: bool) -> Iterator[Line]:
    """The requests of a file; bad lines are left out and named where that is allowed."""
    for line, problem in parse_lines(source):
        if line is not None:
            yield line
        elif skip_bad:
            log.warning("left out: %s", problem)
        else:
            raise DataError(problem)


def parse_lines(source: Path) -> Iterator[tuple[Line | None, str]]:
    """Each line's request, or what is wrong with it; empty lines are passed over.

    Raises:
        DataError: there is no such file.
    """
    if not source.is_file():
        what = "not a plain file, which is read twice" if source.exists() else "no such file"
        raise DataError(f"{source}: {what}; expected a file of JSON lines with {', '.join(FIELDS)}")
    with open(source, "rb") as stream:
        for number, data in numbered_lines(stream, source):
            data = data.removeprefix(BOM_UTF8) if number == 1 else data
            if not data.strip():
                continue
            try:
                yield parse_line(data, number), ""
            except DataError as error:
                yield None, f"{source}:{number}: {error}"


def parse_line(data: bytes, number: int) -> Line:
    """The request of one line.

    Raises:
        DataError: what was found and what was expected; the caller adds where.
    """
    value = parse_json(data, object, unique=True)
    if not isinstance(value, dict):
        raise DataError(f"found a JSON {type(value).__name__}, expected an object with {', '.join(FIELDS)}")
    unknown = sorted(value.keys() - set(FIELDS))
    if unknown:
        raise DataError(f"unknown field {unknown[0]!r}, expected {', '.join(FIELDS)}")
    summary = value.get("summary")
    if summary is not None and not isinstance(summary, str):
        raise DataError(f"summary is {summary!r}, expected a text")
    entries = [as_entry(entry, place) for place, entry in enumerate(as_list(value, "candidates"))]
    if not entries:
        raise DataError("no candidates, expected one text or more")
    items = tuple(as_text(text, f"items[{place}]") for place, text in enumerate(as_list(value, "items")))
    if summary is None and not items:
        raise DataError("neither items nor summary, expected one of them at least")
    texts, ids = zip(*entries, strict=True)
    name = value.get("id", number)
    return Line(Request(texts, items, summary, str(name)), name, ids)


def as_list(value: dict[str, Any], field: str) -> list[Any]:
    """A field that holds a list; a missing one is empty."""
    found = value.get(field, [])
    if not isinstance(found, list):
        raise DataError(f"{field} is {str(found)[:40]!r}, expected a list of texts")
    return found


def as_entry(entry: Any, place: int) -> tuple[str, Any]:
    """Text and id of a candidate."""
    if isinstance(entry, dict):
        return as_text(entry.get("text"), f"candidates[{place}].text"), entry.get("id")
    return as_text(entry, f"candidates[{place}]"), None


def as_text(value: Any, name: str) -> str:
    """A text that is not empty."""
    if not isinstance(value, str) or not has_text(value):
        raise DataError(f"{name} is {str(value)[:40]!r}, expected a text that is not empty")
    return value


def answer(line: Line, ranking: Ranking) -> dict[str, Any]:
    """One line of the output."""
    value = {"id": line.name, "summary": ranking.summary}
    if ranking.trims:
        value["trims"] = ranking.trims
    value["ranked"] = ranked = []
    for found in ranking.candidates:
        name = line.ids[found.index]
        entry = {"index": found.index, "text": found.text, "score": found.score}
        ranked.append(entry if name is None else {"id": name} | entry)
    return value
