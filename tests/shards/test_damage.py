"""Every kind of damage is found and named; none is silent."""

from __future__ import annotations

import errno
import io
import os
import re
import tarfile
from itertools import islice
from pathlib import Path

import pytest

from tests.shards.world import flip_byte, make_builder, make_sample, make_split
from trsr_dist.errors import DataError
from trsr_dist.shards.codec import decode_outline, decode_sample, encode_sample
from trsr_dist.shards.index import build_index, index_path, scan_tar, write_index
from trsr_dist.shards.measure import Share, measure_lengths
from trsr_dist.shards.plan import PackingSettings
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream
from trsr_dist.shards.writer import write_shard

SETTINGS = PackingSettings(row_tokens=500, rows_per_step=3, negatives_per_positive=1, seed=1)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return make_split(tmp_path / "train", (12, 9))


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


def test_truncated_tar(shards: ShardSet) -> None:
    offset = int(shards.shard(0).rows[5]["offset"])
    truncate(shards.path(0), offset + 20)
    with pytest.raises(DataError, match=r"train-000000\.tar: \d+ bytes, the manifest says \d+: truncated"):
        ShardSet(shards.folder).read(0)
    with pytest.raises(DataError, match=r"after 5 samples|truncated"):
        scan_tar(shards.path(0))


def test_broken_header_in_mid_tar(shards: ShardSet) -> None:
    flip_byte(shards.path(0), int(shards.shard(0).rows[5]["offset"]) - 512 + 150)
    with pytest.raises(DataError, match=r"broken header at byte \d+, after 5 samples"):
        scan_tar(shards.path(0))
    assert ShardSet(shards.folder).read_many(range(12)) == [make_sample(number) for number in range(12)], (
        "where other readers lose the rest, the index still finds it"
    )


@pytest.mark.parametrize("kept", [0, 512])
def test_missing_end_marker(shards: ShardSet, kept: int) -> None:
    row = shards.shard(0).rows[-1]
    end = -(-(int(row["offset"]) + int(row["num_bytes"])) // 512) * 512
    truncate(shards.path(0), end + kept)
    with pytest.raises(DataError, match="no end marker at byte"):
        scan_tar(shards.path(0))


def test_flipped_byte(shards: ShardSet) -> None:
    row = shards.shard(1).rows[3]
    flip_byte(shards.path(1), int(row["offset"]) + 30)
    place = rf"train-000001\.tar: sample 3 \(member '[0-9a-f]{{32}}\.json', byte {row['offset']}\): checksum"
    with pytest.raises(DataError, match=place):
        ShardSet(shards.folder).read(12 + 3)


def test_missing_shard_and_missing_index(shards: ShardSet) -> None:
    index_path(shards.path(0)).unlink()
    with pytest.raises(DataError, match=r"tar\.index: missing"):
        ShardSet(shards.folder)
    shards.path(0).unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar: missing"):
        ShardSet(shards.folder)


def test_tar_replaced_after_the_index_was_made(shards: ShardSet) -> None:
    """The new tar has the size of the old one and a valid form; only its content differs."""
    path = shards.path(1)
    samples = shards.read_many(range(12, 21))
    swapped = [samples[1], samples[0], *samples[2:]]
    old_index = index_path(path).read_bytes()
    write_shard(path, swapped)
    assert path.stat().st_size == shards.facts[1]["num_bytes"]
    index_path(path).write_bytes(old_index)
    for number in (12, 13):
        with pytest.raises(DataError, match=r"train-000001\.tar: sample .*checksum differs"):
            ShardSet(shards.folder).read(number)


def test_a_copy_whose_tars_came_last_is_read_without_hashing_them(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As several streams copy, or one from a store: every rank opens every shard, and many again and again."""
    for number in range(len(shards.facts)):
        os.utime(index_path(shards.path(number)), ns=(0, 0))
    monkeypatch.setattr("hashlib.file_digest", None)
    assert shards.read_many(range(21)) == [make_sample(number) for number in range(21)]


def test_index_of_another_tar(shards: ShardSet) -> None:
    index_path(shards.path(1)).write_bytes(index_path(shards.path(0)).read_bytes())
    with pytest.raises(DataError, match=r"made from another version of train-000001\.tar"):
        ShardSet(shards.folder).read(12)


@pytest.mark.parametrize("content", [b"", b"not an index at all"])
def test_damaged_index(shards: ShardSet, content: bytes) -> None:
    index_path(shards.path(1)).write_bytes(content)
    with pytest.raises(DataError, match="not an index"):
        ShardSet(shards.folder).read(12)


@pytest.mark.parametrize("place", [8, 24, 100])
def test_flipped_bit_in_an_index(shards: ShardSet, place: int) -> None:
    flip_byte(index_path(shards.path(1)), place)
    with pytest.raises(DataError, match=r"train-000001\.tar\.index: (damaged|made from another)"):
        ShardSet(shards.folder).read(12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "not valid JSON"),
        (lambda data: data.replace(b'"summary"', b'"sumary"'), "field 'summary': found nothing, expected str"),
        (lambda data: b"[1]", "a JSON list; expected an object"),
        (lambda data: data.replace(b'"label"', b'"lable"'), "a candidate lacks 'label'"),
        (lambda data: b"\xff" + data, "not valid JSON"),
        (lambda data: data.replace(b'"label":0', b'"label":"no"'), "expected item and text as text, and label 0 or 1"),
        (lambda data: re.sub(rb'"candidates":\[.*\],"prov', b'"candidates":[],"prov', data), "'candidates': an empty"),
        (lambda data: data.replace(b'"recent":[', b'"recent":[3,'), "'recent': expected texts only"),
    ],
)
def test_malformed_sample_is_named(tmp_path: Path, change: object, message: str) -> None:
    """Bytes as they were written, but wrong from the start: the checksum is fine."""
    split = make_split(tmp_path / "train", (6,))
    members = [encode_sample(make_sample(number)) for number in range(6)]
    members[4] = change(members[4])
    write_foreign(split.path(0), {f"../../k{number}": data for number, data in enumerate(members)})
    rows = build_index(split.path(0))
    write_index(split.path(0), rows, split.facts[0]["sha256"])
    split.facts[0]["num_bytes"] = split.path(0).stat().st_size
    split.close()
    with pytest.raises(
        DataError, match=rf"train-000000\.tar: sample 4 \(member '../../k4\.json', byte \d+\).*{message}"
    ):
        split.read(4)
    assert split.read(3) == make_sample(3)


def write_foreign(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{name}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_member_names_are_never_paths(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "x.tar"
    path.parent.mkdir(parents=True)
    write_foreign(
        path, {"../../escaped": encode_sample(make_sample(0)), "/etc/absolute": encode_sample(make_sample(1))}
    )
    rows = build_index(path)
    assert len(rows) == 2
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["x.tar", "x.tar.index"]


def test_fail_stops_the_stream_and_names_the_sample(shards: ShardSet) -> None:
    TrainStream(shards, make_builder(), SETTINGS)
    flip_byte(shards.path(0), int(shards.shard(0).rows[2]["offset"]) + 9)
    stream = TrainStream(ShardSet(shards.folder), make_builder(), SETTINGS, Share(num_workers=1))
    with pytest.raises(DataError, match=r"^/.*train-000000\.tar: sample 2 .*checksum"):
        list(islice(stream, stream.steps_in_epoch(0)))


def test_skip_leaves_out_one_user_and_keeps_the_steps(shards: ShardSet) -> None:
    whole = TrainStream(shards, make_builder(), SETTINGS)
    before = list(islice(whole, whole.steps_in_epoch(0)))
    flip_byte(shards.path(0), int(shards.shard(0).rows[2]["offset"]) + 9)
    stream = TrainStream(ShardSet(shards.folder), make_builder(), SETTINGS, max_data_errors=100)
    after = list(islice(stream, stream.steps_in_epoch(0)))
    assert [step.num_answers for step in after] == [step.num_answers for step in before]
    assert [len(step.rows) for step in after] == [len(step.rows) for step in before]
    lost = {u for s in before for r in s.rows for u in r.users} - {u for s in after for r in s.rows for u in r.users}
    assert lost == {"user/2"} and sum(len(step.errors) for step in after) == 1


@pytest.mark.parametrize("call", ["pread", "open"])
def test_what_cannot_be_read_now_is_not_kept_as_damaged(
    shards: ShardSet, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A disk or server that fails for a moment; the lengths are kept for good."""
    shards = ShardSet(shards.folder)
    with monkeypatch.context() as broken:
        if call == "pread":
            broken.setattr("os.pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
        else:
            emfile = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            broken.setattr("trsr_dist.shards.reader.plain", lambda *_: (_ for _ in ()).throw(emfile))
        with pytest.raises(DataError, match="Input/output error|Too many open files"):
            measure_lengths(shards, make_builder(), tolerate=True)
    assert measure_lengths(shards, make_builder(), tolerate=True).facts.num_damaged == 0


def test_skip_leaves_out_the_users_of_a_truncated_shard_and_keeps_the_steps(shards: ShardSet) -> None:
    whole = TrainStream(shards, make_builder(), SETTINGS)
    before = list(islice(whole, whole.steps_in_epoch(0)))
    truncate(shards.path(1), int(shards.index(1)[4]["offset"]) + 9)
    stream = TrainStream(ShardSet(shards.folder), make_builder(), SETTINGS, max_data_errors=100)
    after = list(islice(stream, stream.steps_in_epoch(0)))
    assert [step.num_answers for step in after] == [step.num_answers for step in before]
    left = {user for step in after for row in step.rows for user in row.users}
    assert left == {f"user/{number}" for number in range(12)} and sum(len(step.errors) for step in after) == 9
    with pytest.raises(DataError, match=r"train-000001\.tar: \d+ bytes, the manifest says"):
        list(islice(TrainStream(ShardSet(shards.folder), make_builder(), SETTINGS), len(before)))


def test_tolerance_turns_fatal(shards: ShardSet) -> None:
    stream = TrainStream(shards, make_builder(), SETTINGS, max_data_errors=2)
    stream.check_errors(2, "sample 1")
    with pytest.raises(DataError, match=r"^sample 1; that makes 3, train\.max_data_errors allows 2$"):
        stream.check_errors(3, "sample 1")


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_damage_found_while_measuring(shards: ShardSet, policy: str) -> None:
    flip_byte(shards.path(0), int(shards.shard(0).rows[2]["offset"]) + 9)
    damaged = ShardSet(shards.folder)
    if policy == "fail":
        with pytest.raises(DataError, match="sample 2 .*checksum"):
            TrainStream(damaged, make_builder(), SETTINGS)
        return
    stream = TrainStream(damaged, make_builder(), SETTINGS, max_data_errors=100)
    steps = list(islice(stream, stream.steps_in_epoch(0)))
    assert sum(step.num_users for step in steps) == len(shards) - 1
    with pytest.raises(DataError, match="that makes 1, train.max_data_errors allows 0"):
        TrainStream(damaged, make_builder(), SETTINGS, max_data_errors=0)
    with pytest.raises(DataError, match=r"train-000000\.tar"):
        TrainStream(ShardSet(shards.folder), make_builder(), SETTINGS)


def test_sample_round_trip() -> None:
    sample = make_sample(7)
    assert decode_sample(encode_sample(sample)) == sample
    assert decode_sample(encode_sample(sample), (2, 0)).candidates == (sample.candidates[2], sample.candidates[0])
    items, labels = [c.item for c in sample.candidates], [c.label for c in sample.candidates]
    assert decode_outline(encode_sample(sample)) == (sample.user, items, labels, sample.provenance)
    with pytest.raises(DataError, match="the sample lacks 'candidates'"):
        decode_outline(b"{}")
