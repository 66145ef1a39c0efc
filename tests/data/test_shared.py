"""Preparing on several tasks: the bytes of one task, whoever made what, whoever died on the way."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.raw import (
    LENGTH,
    NUM_ITEMS,
    behavior_line,
    clicks,
    make_config,
    user_records,
    write_amazon,
    write_jsonl,
    write_mind,
)
from trsr_dist.config import Config
from trsr_dist.data import build, jsonl, published, source, tables
from trsr_dist.data import prepare as job
from trsr_dist.data.parts import part_of_name
from trsr_dist.data.shared import SharedWork
from trsr_dist.data.source import Counts
from trsr_dist.errors import DataError, TrsrError
from trsr_dist.files import remove_folder, sha256_of, write_json
from trsr_dist.leases import LeaseFolder
from trsr_dist.liveness import Owner

USERS = 30
SMALL = ["data.unknown_items=skip", "data.candidates=popularity"]
PHASES = ("inputs", "items", "log", "users", "clicks", "candidates")


def single_clicks() -> list[dict]:
    """Of users in disorder; some are there twice, some items are unknown."""
    times = (1_600_000_000 + 60 * place for place in range(LENGTH))
    rows = [
        {"user": f"u{user}", "item": clicks(user)[place], "time": time}
        for place, time in enumerate(times)
        for user in range(USERS)
    ]
    random.Random(0).shuffle(rows)
    return [*rows, *rows[:9], rows[0] | {"item": "X1"}, rows[0] | {"item": "X2"}, rows[0] | {"item": "X2"}]


def write_parquet(folder: Path) -> None:
    raw = write_jsonl(folder, [])
    pq.write_table(pa.Table.from_pylist(single_clicks()), raw / "interactions.parquet", row_group_size=50)
    (raw / "interactions.jsonl").unlink()


def write_repeated_mind(folder: Path) -> None:
    """Later rows of a user do not count, not even for what is wrong with them."""
    with open(write_mind(folder, USERS) / "behaviors.tsv", "a") as stream:
        stream.writelines(behavior_line(user, clicks(user + 1)) for user in range(0, USERS, 3))
        stream.write("9\tU7\tno time\tN1 N2\tN1-0\n" + behavior_line(98, ["N1", "X1", "N2"]))


def write_users(folder: Path) -> None:
    records = user_records(USERS)
    later = [record | {"time": 10**12 + number} for number, record in enumerate(records)]
    write_jsonl(folder, [*records[:20], *later])


FORMATS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "mind": ("mind", write_repeated_mind),
    "sessions": ("amazon_m2", lambda folder: write_amazon(folder, USERS)),
    "users": ("jsonl", write_users),
    "clicks": ("jsonl", lambda folder: write_jsonl(folder, single_clicks())),
    "parquet": ("table", write_parquet),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several units of the log and several parts of the users."""
    monkeypatch.setattr(job, "PART_BYTES", 1500)
    monkeypatch.setattr(job, "LEAVING_SECONDS", 5.0)
    monkeypatch.setattr(source, "UNIT_BLOCKS", 1)
    monkeypatch.setattr(source, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 2000)
    for module in (jsonl, published, tables):
        monkeypatch.setattr(module, "UNIT_ROWS", 10)


def config_of(folder: Path, name: str, run: str, *settings: str) -> Config:
    data_format, write = FORMATS[name]
    if not (folder / "raw_files").exists():
        write(folder)
    items = ["data.items_file=items.jsonl"] if name == "parquet" else []
    return make_config(folder, data_format, f"run.dir={folder / run}", *SMALL, *items, *settings)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in (folder / "histories").iterdir()}


def start(config: Config, number: int, num_tasks: int, dies_in: str = "") -> int:
    """One of several tasks, in another process; it may die in a phase."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        job.task_number = lambda: (number, num_tasks)
        if dies_in:
            SharedWork._record = dying_in(dies_in, SharedWork._record)
        status = job.prepare(config)
    except TrsrError as error:
        (Path(config.run.dir) / f"error-{number}").write_text(str(error))
    finally:
        os._exit(status)


def dying_in(phase: str, record: Callable) -> Callable:
    """At the second piece of the phase, or its only one, when what it holds has been written."""
    made: Counter[str] = Counter()

    def dying(self: SharedWork, piece: object, folder: Path, action: Callable) -> dict:
        found, name = record(self, piece, folder, action), folder.name.split(".")[1].partition("-")[0]
        made[name] += 1
        if name == phase and (made[name] == 2 or name == "items"):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    return dying


def ends(*pids: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_what_is_counted_of_a_part_does_not_grow_with_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of millions of items hundreds of parts would each hold a copy."""
    monkeypatch.setattr(job, "_tidy", lambda *_: None)
    sizes = []
    for num_items in (NUM_ITEMS, 30 * NUM_ITEMS):
        folder = tmp_path / str(num_items)
        write_jsonl(folder, single_clicks(), [{"id": f"N{item}", "text": f"Thing {item}"} for item in range(num_items)])
        assert job.prepare(config_of(folder, "clicks", "run")) == 0
        found = sorted((folder / "run").glob(".histories.work/*/clicks-*/*.np*"))
        sizes.append([path.stat().st_size for path in found])
    assert len(sizes[0]) > 3
    assert sizes[0] == sizes[1]


def test_users_are_chosen_with_one_look_at_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task does this by itself: on a shared disk a million files would be opened for a thousand parts."""
    opened, num_parts, is_choosing = [], [], []
    plain_map, plain_choose = pa.memory_map, build.Build._choose

    def counted_map(path: str, *arguments: object) -> pa.MemoryMappedFile:
        opened.extend([path] * bool(is_choosing))
        return plain_map(path, *arguments)

    def watched_choose(self: build.Build) -> build.KeptUsers:
        num_parts.append(self._num_parts)
        is_choosing.append(True)
        found = plain_choose(self)
        is_choosing.clear()
        return found

    monkeypatch.setattr(pa, "memory_map", counted_map)
    monkeypatch.setattr(build.Build, "_choose", watched_choose)
    assert job.prepare(config_of(tmp_path, "clicks", "run")) == 0
    assert len(opened) <= num_parts[0] > 3


@pytest.mark.parametrize("name", FORMATS)
def test_two_tasks_write_the_bytes_of_one(tmp_path: Path, name: str) -> None:
    alone, together = (config_of(tmp_path, name, run) for run in ("alone", "together"))
    assert job.prepare(alone) == 0
    assert ends(*[start(together, number, 2) for number in range(2)]) == [0, 0]
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == ["config", "histories"]


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_of_any_size_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert job.prepare(config_of(tmp_path, name, "pieces")) == 0
    monkeypatch.undo()
    assert job.prepare(config_of(tmp_path, name, "whole")) == 0
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


@pytest.mark.parametrize("phase", PHASES)
def test_what_a_killed_task_left_is_made_by_others(tmp_path: Path, phase: str) -> None:
    """One of three dies; all die of one task, and it starts again."""
    one, alone, together = (config_of(tmp_path, "clicks", run) for run in ("one", "alone", "together"))
    job.prepare(one)
    assert ends(start(alone, 0, 1, phase)) == [-signal.SIGKILL]
    left = {path.name for path in (tmp_path / "alone").glob(".histories.work/work-*/[!.]*")}
    assert not (tmp_path / "alone" / "histories").exists() and left
    made, record = set(), SharedWork._record

    def noted(self: SharedWork, piece: object, folder: Path, action: Callable) -> dict:
        made.add(folder.name.split(".")[1])
        return record(self, piece, folder, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedWork, "_record", noted)
        job.prepare(alone)
    assert made and not left & made, "what is there is not made again"
    assert sorted(ends(*[start(together, number, 3, phase * (not number)) for number in range(3)])) in (
        [-signal.SIGKILL, 0, 0],
        [0, 0, 0],  # the others may have left it too little
    )
    assert contents(tmp_path / "alone") == contents(tmp_path / "together") == contents(tmp_path / "one")


@pytest.mark.parametrize("begun", [False, True])
def test_a_task_that_joins_as_the_others_leave_finds_their_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """They remove what is shared before it has registered, or just then."""
    config, joined, claim = config_of(tmp_path, "clicks", "late"), [], job.claim
    job.prepare(config)
    before = contents(tmp_path / "late")

    @contextmanager
    def joining(root: Path, *what: object) -> Iterator[object]:
        joined.append(root)
        if len(joined) == 1 and not begun:
            raise FileNotFoundError(root)
        with claim(root, *what) as mine:
            if len(joined) == 1:
                remove_folder(root)
            yield mine

    monkeypatch.setattr(job, "claim", joining)
    assert job.prepare(config) == 0 and len(joined) == 2 - begun
    assert contents(tmp_path / "late") == before
    assert begun or not joined[0].exists(), "a task that has lost its claim leaves the folder to the next one"


@pytest.mark.parametrize(
    ("name", "wrong", "settings", "message"),
    [
        ("mind", "1\tU99\tno time\tN1 N2\tN1-0\n1\tU98\n", (), r"behaviors\.tsv:43: time 'no time'"),
        ("mind", "1\tU98\n1\tU99\tno time\tN1 N2\tN1-0\n", (), r"behaviors\.tsv:43: 2 columns"),
        ("mind", "", ("data.unknown_items=fail",), r"behaviors\.tsv:42: user 'U98' has item 'X1'"),
        ("clicks", "{}\n", (), r"interactions\.jsonl:193: no field 'user'"),
        ("clicks", "", ("data.unknown_items=fail",), r"interactions\.jsonl:\d+: user 'u\d+' has item 'X1'"),
        ("users", "", ("evaluate.negatives_per_positive=54",), r"valid user 'u\d+': 4\d catalogue items"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_as_by_one_task(
    tmp_path: Path, name: str, wrong: str, settings: tuple[str, ...], message: str
) -> None:
    config = config_of(tmp_path, name, "together", *settings)
    log = next(path for path in (tmp_path / "raw_files").iterdir() if path.name[:2] in ("be", "in"))
    log.write_text(log.read_text() + wrong)
    with pytest.raises(DataError, match=message) as found:
        job.prepare(config_of(tmp_path, name, "alone", *settings))
    assert ends(*[start(config, number, 2) for number in range(2)]) == [1, 1]
    run = tmp_path / "together"
    assert [(run / f"error-{number}").read_text() for number in range(2)] == [str(found.value)] * 2
    assert not (run / "histories").exists() and not list((tmp_path / "alone").iterdir())


def test_what_another_task_is_making_does_not_count(tmp_path: Path) -> None:
    """Nor is it an error where it has been renamed meanwhile."""
    work = SharedWork(tmp_path, LeaseFolder(tmp_path / "leases", Owner.myself(), 60.0), Counts())
    for name, number in {"log-000000": 3, ".log-000001.tmp-host-1-1-0a": 4}.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "facts.json", {"facts": None, "counts": {"users_read": number}, "error": None})
    (tmp_path / ".log-000002.tmp-host-1-1-0b").mkdir()
    assert work.total() == {"users_read": 3} and not work.has_failed()


def test_each_raw_file_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for its hash, once for what it holds, and the head of a log of JSON lines for its form."""
    config, read = config_of(tmp_path, "clicks", "run"), Counter()
    opened = source.open_raw

    class Counted:
        def __init__(self, path: Path) -> None:
            self._name, self._stream = path.name, opened(path)

        def __getattr__(self, name: str) -> object:
            return getattr(self._stream, name)

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *error: object) -> None:
            self._stream.close()

        def read(self, size: int) -> bytes:
            read[self._name] += len(block := self._stream.read(size))
            return block

        def readline(self, size: int) -> bytes:
            read[self._name] += len(line := self._stream.readline(size))
            return line

    for module in (source, job):
        monkeypatch.setattr(module, "open_raw", Counted)
    monkeypatch.setattr(job, "sha256_of", lambda path: read.update({path.name: path.stat().st_size}) or sha256_of(path))
    job.prepare(config)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "raw_files").iterdir()}
    assert read["items.jsonl"] == 2 * sizes["items.jsonl"]
    head = read["interactions.jsonl"] - 2 * sizes["interactions.jsonl"]
    assert 0 < head <= 1100


def test_names_are_dealt_evenly_and_alike_in_any_array() -> None:
    names = pa.array([f"user {number}" for number in range(4000)])
    parts = part_of_name(names, 7)
    assert np.bincount(parts, minlength=7).min() > 480
    assert part_of_name(names[1000:], 7).tolist() == parts[1000:].tolist()
    assert part_of_name(pa.array(["x" * 300, "user 3"]), 7)[1] == parts[3]
