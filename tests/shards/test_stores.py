"""Shards in a store: the same samples as from disk, through the node's copies or without; faults are named."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from werkzeug.wrappers import Response

from tests.shards.world import flip_byte, make_builder, make_sample, make_split
from tests.stores import KEY, Store, running_store
from trsr_dist import stores
from trsr_dist.errors import DataError, RunError
from trsr_dist.shards.cache import ShardCache
from trsr_dist.shards.measure import Share, measure_lengths
from trsr_dist.shards.reader import ShardSet

SIZES = (12, 9, 10)
NAMES = [f"train-{number:06d}.tar" for number in range(3)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="module", params=["http", "s3"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with running_store(request.param, tmp_path_factory.mktemp("served")) as store:
        yield store


@pytest.fixture
def store(server: Store, tmp_path: Path) -> Store:
    """Holds the tars of ``tmp_path / train``, which keeps the rest."""
    server.fault = lambda path: None
    shards = make_split(tmp_path / "train", SIZES)
    for number, name in enumerate(NAMES):
        server.put(shards.path(number), f"run/train/{name}")
        shards.path(number).rename(tmp_path / name)
    server.paths.clear()
    return server


def open_set(store: Store, tmp_path: Path, max_bytes: int = 10**9) -> ShardSet:
    return ShardSet(tmp_path / "train", ShardCache(tmp_path / "disk", max_bytes), url=store.url("run/train/"))


@pytest.mark.parametrize("max_bytes", [10**9, 30_000], ids=["room", "no room"])
def test_samples_are_those_of_the_disk(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    monkeypatch.setattr(stores, "PART_BYTES", 7000)
    shards = open_set(store, tmp_path, max_bytes)
    order = [*range(30, -1, -1), *range(31)]
    assert shards.read_many(order) == [make_sample(number) for number in order]
    copies = {path.stem for path in (tmp_path / "disk").glob("*.tar")}
    assert copies <= {facts["sha256"] for facts in shards.facts} and len(copies) == (3 if max_bytes == 10**9 else 1)
    if len(copies) == 3:
        store.paths.clear()
        open_set(store, tmp_path).read_many(order)
        assert not store.paths, "read from the copies"


def test_lengths_are_measured_by_several_processes(store: Store, tmp_path: Path) -> None:
    shards = open_set(store, tmp_path)
    shards.read(0)
    facts = measure_lengths(shards, make_builder(), Share(num_workers=2)).facts
    assert facts.num_samples == 31 and not facts.num_damaged


@pytest.mark.parametrize(("status", "words"), [(403, "get permission to read it"), (404, "correct the address")])
def test_what_is_refused_is_not_asked_for_again(store: Store, tmp_path: Path, status: int, words: str) -> None:
    store.fault = lambda path: Response("no", status)
    with pytest.raises(RunError, match=rf"{store.url('run/train/' + NAMES[1])}: \w+: .*{words}") as error:
        open_set(store, tmp_path).read(12)
    assert len(store.paths) == 1 and KEY not in str(error.value)
    assert not [*(tmp_path / "disk").glob("*.[tp]ar*")], "no partial copy stays"


def test_a_missing_object_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"elsewhere/{NAMES[0]}: .*; correct the address, or upload the file again"):
        ShardSet(tmp_path / "train", url=store.url("elsewhere")).read(0)


def test_a_slow_answer_is_asked_for_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "TRY_SECONDS", 0.5)
    slow = [1.0]

    def fault(path: str) -> None:
        time.sleep(slow.pop() if slow else 0)

    store.fault = fault
    assert open_set(store, tmp_path).read(0) == make_sample(0)
    slow += [1.0] * 3
    with pytest.raises(
        RunError, match=rf"{NAMES[1]}: TimeoutError: no answer within 0.5 s, 3 times; check the network"
    ):
        open_set(store, tmp_path).read(12)


def test_a_server_that_fails_for_a_moment(store: Store, tmp_path: Path) -> None:
    faults = [Response("busy", 503), Response(status=444)]
    store.fault = lambda path: faults.pop() if faults else None
    assert open_set(store, tmp_path).read(0) == make_sample(0)


def test_a_damaged_object_is_named_by_its_sample(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = open_set(store, tmp_path)
    flip_byte(tmp_path / NAMES[1], int(shards.index(1)[3]["offset"]) + 5)
    store.put(tmp_path / NAMES[1], f"run/train/{NAMES[1]}")
    with pytest.raises(DataError, match=rf"{NAMES[1]}: sample 3 \(member .*\): checksum differs"):
        shards.read(12 + 3)
    assert shards.read(12 + 4) == make_sample(12 + 4)
    assert f"{NAMES[1]}: not copied to the node, its checksum differs from the manifest's" in caplog.text


def test_a_truncated_object_is_named(store: Store, tmp_path: Path) -> None:
    os.truncate(tmp_path / NAMES[2], 9000)
    store.put(tmp_path / NAMES[2], f"run/train/{NAMES[2]}")
    with pytest.raises(DataError, match=rf"{NAMES[2]}: 9000 bytes came from byte 0 on, expected \d+: truncated"):
        open_set(store, tmp_path).read(30)
    assert not [*(tmp_path / "disk").glob("*.[tp]ar*")], "no partial copy stays"


def test_the_index_stays_in_the_run_folder(store: Store, tmp_path: Path) -> None:
    shutil.copy(tmp_path / NAMES[0], tmp_path / "train" / NAMES[0])
    (tmp_path / "train" / f"{NAMES[2]}.index").unlink()
    with pytest.raises(DataError, match=rf"{NAMES[2]}\.index: missing"):
        open_set(store, tmp_path)
