"""The node's copies of shards: fetched once, checked, limited, and cleared when the disk is full."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.shards.world import flip_byte, make_sample, make_split, write_split
from trsr_dist.errors import ConfigError, DataError
from trsr_dist.files import sha256_of
from trsr_dist.shards.cache import ShardCache
from trsr_dist.shards.reader import ShardSet

GIGABYTE = 10**9
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return make_split(tmp_path / "train", (12, 9, 10))


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def names(shards: ShardSet, *numbers: int) -> set[str]:
    return {f"{shards.facts[number]['sha256']}.tar" for number in numbers}


def check_samples(shards: ShardSet) -> None:
    assert shards.read_many(range(31)) == [make_sample(number) for number in range(31)]


def test_copies_are_read_instead_of_the_shards(shards: ShardSet, tmp_path: Path) -> None:
    check_samples(ShardSet(shards.folder, ShardCache(tmp_path / "disk", GIGABYTE)))
    assert copies(tmp_path / "disk") == names(shards, 0, 1, 2)
    for number in range(3):
        os.truncate(shards.path(number), 0)
    check_samples(ShardSet(shards.folder, ShardCache(tmp_path / "disk", GIGABYTE)))
    with pytest.raises(DataError, match="truncated"):
        ShardSet(shards.folder).read(0)


def test_a_damaged_copy_gives_way_to_the_shard(shards: ShardSet, tmp_path: Path) -> None:
    check_samples(ShardSet(shards.folder, ShardCache(tmp_path / "disk", GIGABYTE)))
    flip_byte(tmp_path / "disk" / names(shards, 1).pop(), int(shards.index(1)[3]["offset"]) + 5)
    check_samples(ShardSet(shards.folder, ShardCache(tmp_path / "disk", GIGABYTE)))
    assert copies(tmp_path / "disk") == names(shards, 0, 2)


def test_a_damaged_shard_is_not_copied_and_its_sample_is_named(shards: ShardSet, tmp_path: Path) -> None:
    flip_byte(shards.path(1), int(shards.index(1)[3]["offset"]) + 5)
    cached = ShardSet(shards.folder, ShardCache(tmp_path / "disk", GIGABYTE))
    assert cached.read(12 + 4) == make_sample(12 + 4)
    with pytest.raises(DataError, match=r"train-000001\.tar: sample 3 .*checksum"):
        cached.read(12 + 3)
    assert not copies(tmp_path / "disk")


def test_the_limit_holds_and_a_set_does_not_push_out_its_own_shards(shards: ShardSet, tmp_path: Path) -> None:
    limit = shards.facts[0]["num_bytes"] + shards.facts[1]["num_bytes"]
    cached = ShardSet(shards.folder, ShardCache(tmp_path / "disk", limit))
    check_samples(cached)
    assert copies(tmp_path / "disk") == names(shards, 0, 1)


def test_what_others_have_closed_makes_room(shards: ShardSet, tmp_path: Path) -> None:
    other = write_split(tmp_path / "other", [make_sample(number, 9) for number in range(31)], (12, 9, 10))
    limit = sum(facts["num_bytes"] for facts in other.facts)
    cached = ShardSet(other.folder, ShardCache(tmp_path / "disk", limit))
    cached.read_many(range(31))
    (tmp_path / "disk" / "0123.partial").write_bytes(b"left by a killed process")
    cached.shard(0)
    for number in (1, 2):
        cached.shard(number).close()
    check_samples(ShardSet(shards.folder, ShardCache(tmp_path / "disk", limit)))
    held = copies(tmp_path / "disk") & names(other, 0, 1, 2)
    assert held == names(other, 0), "an open copy stays"
    assert copies(tmp_path / "disk") - held <= names(shards, 0, 1, 2)
    assert sum((tmp_path / "disk" / name).stat().st_size for name in copies(tmp_path / "disk")) <= limit


def test_few_looks_at_all_copies_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among thousands, one for each shard would take longer than the copying, while all ranks of the node wait."""
    looks, plain_files = [], ShardCache._files
    monkeypatch.setattr(ShardCache, "_files", lambda self: looks.append(None) or plain_files(self))
    (tmp_path / "source").write_bytes(b"x" * 1000)

    def num_copied(cache: ShardCache, first: int) -> int:
        """Of 160 shards; they have the same bytes."""
        hashes = [f"{number:064x}" for number in range(first, first + 160)]
        cache.keep(hashes)
        copied = 0
        for sha256 in hashes:
            monkeypatch.setattr("trsr_dist.shards.cache._copy_bytes", lambda *_, found=sha256: found)
            descriptor = cache.open(tmp_path / "source", sha256, 1000)
            if descriptor is not None:
                os.close(descriptor)
                copied += 1
        return copied

    first, second = (ShardCache(tmp_path / "disk", 160_000) for _ in range(2))
    assert num_copied(first, 0) == 160
    assert len(looks) == 1
    assert num_copied(first, 160) == 0, "its own copies stay"
    assert len(looks) <= 3
    assert num_copied(second, 320) == 160, "copies of another set go"
    assert len(looks) <= 40
    assert len(copies(tmp_path / "disk")) <= 160


def fetch(folder: Path, source: Path, content: bytes, results: Connection) -> None:
    """What a rank does at the first sample of a shard."""
    cache = ShardCache(folder, GIGABYTE)
    descriptor = cache.open(source, hashlib.sha256(content).hexdigest(), len(content))
    results.send(descriptor is not None and os.pread(descriptor, len(content), 0) == content)


def start_fetch(folder: Path, source: Path, content: bytes) -> tuple[multiprocessing.Process, Connection]:
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=fetch, args=(folder, source, content, sender))
    process.start()
    return process, receiver


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A source that can be read only once: a second fetch would find nothing and fail."""
    os.mkfifo(tmp_path / "pipe")
    yield tmp_path / "pipe"


def test_ranks_that_want_the_same_shard_fetch_it_once(tmp_path: Path, pipe: Path) -> None:
    content = os.urandom(3_000_000)
    ranks = [start_fetch(tmp_path / "disk", pipe, content) for _ in range(4)]
    pipe.write_bytes(content)
    for process, receiver in ranks:
        assert receiver.recv()
        process.join()
    assert [path.suffix for path in (tmp_path / "disk").iterdir() if path.name != ".lock"] == [".tar"]


def test_a_copy_that_is_done_while_one_looks_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(1000)
    cache, sha256 = ShardCache(tmp_path / "disk", GIGABYTE), hashlib.sha256(content).hexdigest()
    partial, copy = (tmp_path / "disk" / f"{sha256}{ending}" for ending in (".partial", ".tar"))
    partial.write_bytes(content)
    flock = fcntl.flock

    def finished_by_another(descriptor: int, kind: int) -> None:
        if kind == fcntl.LOCK_EX | fcntl.LOCK_NB and partial.exists():
            partial.rename(copy)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", finished_by_another)
    descriptor = cache.open(tmp_path / "no source", sha256, len(content))
    assert descriptor is not None and os.pread(descriptor, len(content), 0) == content


def test_a_killed_fetch_is_taken_over_by_those_who_wait(tmp_path: Path, pipe: Path) -> None:
    content = os.urandom(1_000_000)
    (tmp_path / "file").write_bytes(content)
    first, _ = start_fetch(tmp_path / "disk", pipe, content)
    with open(pipe, "wb") as stream:  # opens once the first rank has begun to read
        stream.write(content[:1000])
        stream.flush()
        second, receiver = start_fetch(tmp_path / "disk", tmp_path / "file", content)
        assert not receiver.poll(0.5), "the second rank waits for the first one's copy"
        first.kill()
        assert receiver.recv()
    second.join()
    assert [path.suffix for path in (tmp_path / "disk").iterdir() if path.name != ".lock"] == [".tar"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_cleared_of_old_copies_only(tmp_path: Path, small_disk: Path) -> None:
    """The limit would allow more than the disk has."""
    sources = [tmp_path / f"{number}.tar" for number in range(4)]
    for source in sources:
        source.write_bytes(os.urandom(400_000))
    cache = ShardCache(small_disk, GIGABYTE)
    hashes = [sha256_of(source) for source in sources]
    cache.keep(hashes[2:])
    first, second = (cache.open(sources[number], hashes[number], 400_000) for number in (0, 1))
    os.close(first)
    third = cache.open(sources[2], hashes[2], 400_000)
    assert second is not None and third is not None
    assert copies(small_disk) == {f"{hashes[1]}.tar", f"{hashes[2]}.tar"}
    assert cache.open(sources[3], hashes[3], 400_000) is None, "the rest is in use: read the shard where it lies"
    assert copies(small_disk) == {f"{hashes[1]}.tar", f"{hashes[2]}.tar"}


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"train\.cache_dir=.*file/x: cannot be used"):
        ShardCache(tmp_path / "file" / "x", GIGABYTE)
