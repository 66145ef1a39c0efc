"""Tars, manifests and indexes that lie: each is refused by name, before what it promises is read."""

from __future__ import annotations

import io
import json
import os
import resource
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.shards.world import make_sample, make_split
from trsr_dist.errors import DataError, TrsrError
from trsr_dist.files import sha256_of
from trsr_dist.run import MANIFEST
from trsr_dist.shards.codec import encode_sample
from trsr_dist.shards.index import ROW, scan_tar, write_index
from trsr_dist.shards.inspect.verify import index_split, verify_split
from trsr_dist.shards.reader import ShardSet


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    """A sample, then these members."""
    with tarfile.open(path, "w") as tar:
        for info, data in (member("a.json", encode_sample(make_sample(1))), *members):
            tar.addfile(info, io.BytesIO(data))
    return path


def sparse(path: Path) -> Path:
    """10 KB that stand for 6 GB: the old GNU format of files with holes."""
    info = tarfile.TarInfo("b.json")
    info.size, info.type = 0, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (6 << 30)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    write_tar(path)
    with open(path, "r+b") as stream:
        stream.seek(-(-len(encode_sample(make_sample(1))) // 512) * 512 + 512)
        stream.write(header)
    return path


def lying(path: Path, size: int, kind: bytes = tarfile.REGTYPE) -> Path:
    """A header that promises ``size`` bytes."""
    write_tar(path)
    info, _ = member("b.json", size=size, type=kind)
    with open(path, "r+b") as stream:
        stream.seek(-(-len(encode_sample(make_sample(1))) // 512) * 512 + 512)
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
    return path


def renaming(path: Path) -> Path:
    """A record longer than it says names the next sample, with a line feed at the end."""
    return write_tar(path, member("x", b"99 path=b.json\n", type=tarfile.XHDTYPE), member("c.json", b"{}"))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: write_tar(path, member("b.json", type=tarfile.SYMTYPE, linkname="a.json")), "'b.json'.*is lost"),
        (lambda path: write_tar(path, member("b.json", type=tarfile.LNKTYPE, linkname="a.json")), "'b.json'.*is lost"),
        (lambda path: write_tar(path, member("b.json", type=tarfile.FIFOTYPE)), "'b.json'.*is lost"),
        (sparse, "'b.json'.*has holes: the sample is lost"),
        (lambda path: lying(path, 2**62), "'b.json'.*4611686018427387904 bytes, where a sample has at most"),
        (lambda path: lying(path, 2**27), "'b.json'.*of 134217728 bytes: the tar is truncated"),
        (lambda path: lying(path, -512), "'b.json'.*-512 bytes|not a readable tar"),
        (lambda path: lying(path, 2**62, tarfile.XHDTYPE), "not a readable tar after 1 samples"),
        (lambda path: lying(path, 2**62, tarfile.GNUTYPE_LONGNAME), "not a readable tar after 1 samples"),
        (lambda path: lying(path, 2**40, tarfile.GNUTYPE_LONGNAME), "not a readable tar after 1 samples"),
        (lambda path: write_tar(path, member("b\udcff.json", b"{}")), "not UTF-8"),
        (lambda path: write_tar(path, member("a.json", b"{}")), "stands twice"),
        (renaming, "'b.json.n.*header is damaged"),
    ],
    ids=range(13),
)
def test_a_tar_that_lies_is_refused_before_it_is_read(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path / "train-000000.tar")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=rf"train-000000\.tar: .*{words}"):
        scan_tar(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_other_members_and_folders_are_passed_over(tmp_path: Path) -> None:
    others = [member("x.json", type=tarfile.DIRTYPE), member("b.txt", type=tarfile.SYMTYPE, linkname="a.json")]
    assert len(scan_tar(write_tar(tmp_path / "a.tar", *others, member("c.json", b"{}")))) == 2


def test_a_lost_sample_is_found_by_verify(tmp_path: Path) -> None:
    """Tar, index and manifest agree on 3 samples: the tar holds a fourth, which is a link."""
    split = make_split(tmp_path / "train", (3,))
    path = split.path(0)
    with tarfile.open(path, "a") as tar:
        tar.addfile(member("z.json", type=tarfile.SYMTYPE, linkname="y.json")[0])
    sha256 = sha256_of(path)
    write_index(path, split.index(0), sha256)
    facts = {**split.facts[0], "sha256": sha256, "num_bytes": path.stat().st_size}
    manifest = json.loads((split.folder / MANIFEST).read_text())
    (split.folder / MANIFEST).write_text(json.dumps(manifest | {"shards": [facts], "num_bytes": facts["num_bytes"]}))
    assert len(ShardSet(split.folder)) == 3
    (error,), _ = verify_split(split.folder)
    assert "'z.json'" in error and "the sample is lost" in error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": -1}, "shards.0.num_samples: .*greater than or equal to 0, found '-1'"),
        ({"num_samples": "3"}, "shards.0.num_samples: .*valid integer, found '3'"),
        ({"num_samples": True}, "shards.0.num_samples: .*valid integer"),
        ({"num_samples": 1 << 60}, "shards.0.num_samples: .*less than"),
        ({"num_bytes": 1.5}, "shards.0.num_bytes: .*valid integer"),
        ({"sha256": 5}, "shards.0.sha256: .*valid string, found '5'"),
        ({"sha256": "x"}, "shards.0.sha256: .*match pattern"),
        ({"candidates": None}, "shards.0.candidates: .*valid string"),
        ({"name": "../train-000000.tar"}, "shards.0.name: .*match pattern"),
        ({"name": "a\0.tar"}, "shards.0.name: .*match pattern"),
    ],
)
def test_a_manifest_of_wrong_types_is_refused_by_name(tmp_path: Path, change: dict, words: str) -> None:
    folder = make_split(tmp_path / "train", (3,)).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0] |= change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    for read in (ShardSet, index_split, verify_split):
        with pytest.raises(DataError, match=rf"train/manifest\.json: {words}"):
            read(folder)


@pytest.mark.parametrize("change", [{"shards": 3}, {"shards": [3]}, {"settings": []}, {"inputs": {"histories": 1}}])
def test_a_manifest_of_another_form_is_refused_by_name(tmp_path: Path, change: dict) -> None:
    folder = make_split(tmp_path / "train", (3,)).folder
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(DataError, match=rf"train/manifest\.json: {next(iter(change))}"):
        ShardSet(folder)


@pytest.mark.parametrize("row", [(2**63 + 5, 0, 10, 0), (512, 0, 2**32 - 1, 0)])
def test_an_index_that_names_bytes_elsewhere_is_refused(tmp_path: Path, row: tuple[int, ...]) -> None:
    split = make_split(tmp_path / "train", (1,))
    write_index(split.path(0), np.array([row], dtype=ROW), split.facts[0]["sha256"])
    with pytest.raises(DataError, match="names bytes that are not in train-000000.tar"):
        ShardSet(split.folder).read(0)


def test_pipes_and_folders_in_the_place_of_shards_are_refused(tmp_path: Path) -> None:
    found = []

    def read_all() -> None:
        for name in ("train-000000.tar", "train-000000.tar.index", MANIFEST):
            for number, make in enumerate((os.mkfifo, Path.mkdir)):
                split = make_split(tmp_path / f"{name}-{number}", (2,))
                (split.folder / name).unlink()
                make(split.folder / name)
                with pytest.raises(TrsrError, match=name):
                    ShardSet(split.folder).read(0)
                found.append(name)
        adopted = tmp_path / "adopted"
        adopted.mkdir()
        os.mkfifo(adopted / "x.tar")
        with pytest.raises(DataError, match=r"x\.tar: a pipe, socket or device"):
            index_split(adopted)
        found.append("adopted")

    reader = threading.Thread(target=read_all, daemon=True)  # a pipe without a writer would hold it for ever
    reader.start()
    reader.join(30)
    assert len(found) == 7
