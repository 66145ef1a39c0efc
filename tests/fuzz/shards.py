"""Shards with their indexes and manifests, tars from elsewhere, and prepared histories.

Oracle: every sample that can be read equals the one that was written under that number, and ``inspect_shards --verify``
finds any change of a tar, an index, or of what the manifest says of them. From changed histories come the shards of the
unchanged ones, or an error. Of a tar from elsewhere all samples are read, and a member that is lost is named.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.data.raw import make_config, user_records, write_jsonl
from tests.fuzz.mutations import FILES, as_nobody, change_bytes, change_json, dump
from tests.fuzz.running import Case, Kind
from tests.shards.world import make_sample, make_split
from tests.summarize.world import run_here, write_config
from trsr_dist.data.prepare import prepare
from trsr_dist.errors import TrsrError
from trsr_dist.records import Sample
from trsr_dist.run import SPLITS
from trsr_dist.shards.codec import decode_sample, encode_sample
from trsr_dist.shards.inspect.job import Options, inspect_shards
from trsr_dist.shards.reader import ShardSet

SIZES = (3, 2)
CHECKED = ("shards", "num_samples", "num_bytes", "candidate_hash")
"""What the manifest says of the tars."""


def make_world(folder: Path) -> Path:
    """A split, and a run with histories and the shards that come from them."""
    make_split(folder / "split", SIZES)
    write_jsonl(folder, user_records(16))
    prepare(make_config(folder, "jsonl"))
    run_here(write_config(folder / "run"))
    return folder


def make(draw: random.Random, folder: Path, world: Path) -> Case:
    match draw.randrange(10):
        case 0 | 1 | 2 | 3:
            return _written(draw, folder, world)
        case 4 | 5 | 6:
            return _foreign(draw, folder)
    return _histories(draw, folder, world)


def samples_of(folder: Path) -> list[Sample]:
    shards = ShardSet(folder)
    return [shards.read(index) for index in range(len(shards))]


def _change_file(draw: random.Random, path: Path) -> tuple[str, bool]:
    """What was done, and whether nobody may read it."""
    roll = draw.random()
    if path.suffix == ".json" and roll < 0.6:
        value, what = change_json(draw, json.loads(path.read_bytes()))
        path.write_text(dump(value), encoding="utf-8", errors="surrogatepass")
    elif roll < 0.8:
        data, what = change_bytes(draw, path.read_bytes())
        path.write_bytes(data)
    else:
        what = draw.choice(sorted(FILES))
        FILES[what](path)
    return f"{path.name}: {what}", what == "unreadable"


def _written(draw: random.Random, folder: Path, world: Path) -> Case:
    """One file of a split is another."""
    split = folder / "train"
    shutil.copytree(world / "split", split)
    paths = sorted(path for path in split.iterdir() if path.is_file())
    path = draw.choice([*paths, split / "manifest.json", split / "manifest.json"])
    title, nobody = _change_file(draw, path)
    read: list[Sample] = []

    def act() -> int:
        if nobody:
            with as_nobody():
                return look()
        return look()

    def look() -> int:
        problem = None
        try:
            shards = ShardSet(split)
            for index in range(len(shards)):
                read.append(shards.read(index))
        except TrsrError as error:
            problem = error
        status = inspect_shards(split, Options(verify=True))
        if problem is not None:
            raise problem
        return status

    return Case(title, act, (path.name, path.stem, "train"), partial(_judge_written, world / "split", split, read))


def _judge_written(before: Path, after: Path, read: list[Sample], status: int, output: str) -> str:
    wanted = [make_sample(number) for number in range(sum(SIZES))]
    for number, sample in enumerate(read):
        if number >= len(wanted) or sample != wanted[number]:
            return f"sample {number} was read as another one"
    if status:
        return ""
    if len(read) != len(wanted):
        return f"{len(read)} of {len(wanted)} samples, and nothing said"
    for path in before.iterdir():
        if path.name != "manifest.json" and path.read_bytes() != (after / path.name).read_bytes():
            return f"{path.name} differs, and nothing was found"
    old, new = (json.loads((folder / "manifest.json").read_bytes()) for folder in (before, after))
    return next((f"manifest: {key} differs, and nothing was found" for key in CHECKED if old[key] != new.get(key)), "")


def _foreign(draw: random.Random, folder: Path) -> Case:
    """A tar as others may write it: odd members between the samples, or odd samples."""
    split = folder / "train"
    split.mkdir()
    odd = draw.choice(sorted(MEMBERS))
    samples = [make_sample(number) for number in range(4)]
    place = draw.randrange(4)
    with tarfile.open(split / "part0.tar", "w", format=draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for number, sample in enumerate(samples):
            if number == place:
                lost = MEMBERS[odd](draw, tar)
            _add(tar, f"k{number}.json", encode_sample(sample))
    read: list[Sample] = []

    def act() -> int:
        status = inspect_shards(split, Options(index=True, verify=True))
        read.extend(samples_of(split))
        return status

    def judge(status: int, output: str) -> str:
        if status:
            return ""
        if lost and "odd" not in output:
            return "a member that is no sample is passed over in silence"
        return "" if read == samples else f"{len(read)} samples read, {len(samples)} written"

    return Case(f"part0.tar: {odd}", act, ("part0.tar", "sample"), judge)


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data) if data else None)


def _changed_sample(draw: random.Random, tar: tarfile.TarFile) -> bool:
    while True:
        value, _ = change_json(draw, json.loads(encode_sample(make_sample(9))))
        data = dump(value).encode("utf-8", "surrogatepass")
        try:
            decode_sample(data)
        except Exception:
            break
    _add(tar, "odd.json", data)
    return True


def _raw_header(tar: tarfile.TarFile, size: bytes, name: str = "odd.json") -> bool:
    """A header with a size that ``tarfile`` would not write."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar.fileobj.write(header)
    tar.offset += len(header)
    return True


def _kept(tar: tarfile.TarFile, *args: Any, **fields: Any) -> bool:
    _add(tar, *args, **fields)
    return False


def _lost(tar: tarfile.TarFile, *args: Any, **fields: Any) -> bool:
    _add(tar, *args, **fields)
    return True


MEMBERS = {
    "a text beside": lambda draw, tar: _kept(tar, "k1.txt", b"a note"),
    "a folder": lambda draw, tar: _kept(tar, "folder/", kind=tarfile.DIRTYPE),
    "a link": lambda draw, tar: _lost(tar, "odd.json", kind=tarfile.SYMTYPE, linkname="k0.json"),
    "a hard link": lambda draw, tar: _lost(tar, "odd.json", kind=tarfile.LNKTYPE, linkname="k0.json"),
    "a link to nothing": lambda draw, tar: _lost(tar, "odd.json", kind=tarfile.LNKTYPE, linkname="none"),
    "a pipe": lambda draw, tar: _lost(tar, "odd.json", kind=tarfile.FIFOTYPE),
    "a device": lambda draw, tar: _lost(tar, "odd.json", kind=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "an unknown type": lambda draw, tar: _lost(tar, "odd.json", encode_sample(make_sample(9)), kind=b"Z"),
    "a folder named as a sample": lambda draw, tar: _lost(tar, "odd.json", kind=tarfile.DIRTYPE),
    "a changed sample": _changed_sample,
    "no bytes": lambda draw, tar: _lost(tar, "odd.json"),
    "a number of 5000 digits": lambda draw, tar: _lost(tar, "odd.json", b'{"user": ' + b"9" * 5000 + b"}"),
    "deep brackets": lambda draw, tar: _lost(tar, "odd.json", b"[" * 100_000),
    "an escape in the name": lambda draw, tar: _lost(tar, "odd\x1b[31m.json", b"{}"),
    "a size of 2^62": lambda draw, tar: _raw_header(tar, b"\x80\0\0\0" + (2**62).to_bytes(8, "big")),
    "a negative size": lambda draw, tar: _raw_header(tar, b"\xff" * 12),
    "a sparse member of 6 GB": lambda draw, tar: _sparse(tar),
    "a bad size": lambda draw, tar: _raw_header(tar, b"zzzzzzzzzzz\0"),
    "a record of wrong length": lambda draw, tar: _kept(tar, "x", b"99 path=odd.json\n", kind=tarfile.XHDTYPE),
}


def _sparse(tar: tarfile.TarFile) -> bool:
    """GNU's sparse form 1.0: a map of no data, and a real size that the header claims."""
    records = "".join(
        f"{len(text) + len(str(len(text) + 3)) + 2} {text}\n"
        for text in (
            "GNU.sparse.major=1",
            "GNU.sparse.minor=0",
            "GNU.sparse.name=odd.json",
            f"GNU.sparse.realsize={6 << 30}",
        )
    ).encode()
    _add(tar, "PaxHeaders/odd", records, kind=tarfile.XHDTYPE)
    _add(tar, "GNUSparseFile.0/odd.json", b"1\n%d\n0\n" % (6 << 30) + bytes(500))
    return True


def _histories(draw: random.Random, folder: Path, world: Path) -> Case:
    """One file of the histories is another; then the summaries are made."""
    run = folder / "run"
    shutil.copytree(world / "run" / "histories", run / "histories")
    config = write_config(run)
    path = draw.choice(sorted((run / "histories").iterdir()))
    title, nobody = _change_file(draw, path)

    def act() -> None:
        if nobody:
            with as_nobody():
                run_here(config)
        run_here(config)

    def judge(status: int, output: str) -> str:
        published = [split for split in SPLITS if (run / "shards" / split / "manifest.json").is_file()]
        for split in published:
            made = samples_of(run / "shards" / split)
            wanted = samples_of(world / "run" / "shards" / split)
            if made != wanted:
                return f"{split}: other shards than from the unchanged histories"
        return "" if status or len(published) == len(SPLITS) else "success without shards"

    return Case(f"histories/{title}", act, (path.name, "histories"), judge)


KIND = Kind("shards", 120, 60.0, make_world, make)
