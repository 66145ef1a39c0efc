"""What the inspection must find: damage at any byte, leaks, duplicates, shortcuts; and tars from elsewhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from tests.data.raw import make_config, user_records, write_jsonl
from tests.shards.test_damage import write_foreign
from tests.shards.world import flip_byte, make_builder, make_sample, make_split, write_split
from tests.tokenizers import byte_level
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError
from trsr_dist.hashing import random_stream
from trsr_dist.records import Candidate, Sample
from trsr_dist.run import RunFolder
from trsr_dist.shards.codec import encode_sample
from trsr_dist.shards.index import index_path
from trsr_dist.shards.inspect.checks import near_duplicates, sample_faults
from trsr_dist.shards.inspect.content import ItemFacts, Shortcuts, user_auc
from trsr_dist.shards.inspect.job import Options, inspect_shards
from trsr_dist.shards.inspect.verify import index_split, verify_split
from trsr_dist.shards.measure import measure_lengths
from trsr_dist.shards.plan import PackingSettings
from trsr_dist.shards.reader import ShardSet
from trsr_dist.shards.stream import TrainStream
from trsr_dist.shards.tables import MINED, SCORES, TABLE, write_table

ROOT = Path(__file__).parents[2]


def problems(folder: Path) -> list[str]:
    return verify_split(folder)[0]


def test_whole_shards_are_found_whole(tmp_path: Path) -> None:
    assert problems(make_split(tmp_path / "train", (5, 4)).folder) == []


def test_damaged_and_foreign_tables_are_found(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (5, 4))
    rows = [np.ones(len(sample.candidates), dtype=np.float32) for sample in shards.read_many(range(9))]
    for name in (MINED, f"{SCORES}-one", f"{SCORES}-other"):
        write_table(shards.folder / name, rows, shards.manifest_hash, "score", {})
    (shards.folder / f"{SCORES}-begun").mkdir()
    assert problems(shards.folder) == []
    flip_byte(shards.folder / MINED / TABLE, 200)
    (shards.folder / f"{SCORES}-one" / TABLE).unlink()
    write_table(shards.folder / f"{SCORES}-other", rows, "0" * 64, "score", {})
    one, other, mined = problems(shards.folder)
    assert f"{SCORES}-one/{TABLE}: missing" in one and "tools/score_shards.py --force" in one
    assert "made with input shards=" in other
    assert f"{MINED}/{TABLE}: missing, or its bytes" in mined and "tools/mine_negatives.py --force" in mined


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000001.tar.index"])
def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, name: str) -> None:
    path = make_split(tmp_path / "train", (5, 4)).folder / name
    size, draw = path.stat().st_size, random_stream(name)
    for place in [0, size - 1, *(draw.randrange(size) for _ in range(40))]:
        flip_byte(path, place)
        assert any("train-000001.tar" in problem for problem in problems(path.parent)), f"byte {place} of {size}"
        flip_byte(path, place)


def test_a_damaged_sample_is_named_and_the_others_are_still_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = make_split(tmp_path / "train", (5, 4))
    place = int(shards.index(1)[2]["offset"])
    flip_byte(shards.path(1), place + 3)
    assert any(f"train-000001.tar: sample 2 (byte {place}): checksum" in problem for problem in problems(shards.folder))
    assert inspect_shards(shards.folder, Options()) == 1
    out = capsys.readouterr().out
    assert "9 users in 2 shards" in out and "error: " in out and "sample 2 (member" in out


def test_missing_and_replaced_shards_are_found(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (5, 5, 4))
    shards.path(1).write_bytes(shards.path(0).read_bytes())
    shards.path(2).unlink()
    found = problems(shards.folder)
    assert any("train-000001.tar: its bytes are not those" in problem for problem in found)
    assert any("train-000002.tar: No such file" in problem for problem in found)


def test_tars_from_elsewhere_are_indexed_and_streamed(tmp_path: Path) -> None:
    """Written by webdataset itself, with further members beside each sample."""
    folder = tmp_path / "train"
    folder.mkdir()
    for shard, numbers in enumerate((range(6), range(6, 11))):
        with wds.TarWriter(str(folder / f"part{shard}.tar"), encoder=False) as tar:
            for number in numbers:
                tar.write({"__key__": f"k{number}", "json": encode_sample(make_sample(number)), "txt": b"a note"})
    index_split(folder)
    shards = ShardSet(folder)
    assert shards.read_many(range(11)) == [make_sample(number) for number in range(11)]
    assert problems(folder) == []
    stream = TrainStream(shards, make_builder(), PackingSettings(500, 3, 1, 0))
    steps = list(islice(stream, stream.steps_in_epoch(0)))
    assert sorted(u for s in steps for r in s.rows for u in r.users) == sorted(f"user/{i}" for i in range(11))


@pytest.mark.parametrize(
    ("members", "message"),
    [({}, "no \\*.json member"), ({"a": b"{}"}, r"sample 0 \(byte 512\): field 'user': found nothing")],
)
def test_tars_without_samples_are_refused(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write_foreign(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=message):
        index_split(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_missing_indexes_are_built_for_the_tars_of_the_manifest_only(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (5, 4))
    content = index_path(shards.path(1)).read_bytes()
    index_path(shards.path(1)).unlink()
    index_split(shards.folder)
    assert index_path(shards.path(1)).read_bytes() == content
    index_path(shards.path(0)).write_bytes(b"")
    flip_byte(shards.path(0), 600)
    with pytest.raises(DataError, match=r"train-000000\.tar: missing, or not the tar that the manifest"):
        index_split(shards.folder)


def with_target(sample: Sample, **change: object) -> Sample:
    """The same sample with a changed positive."""
    candidates = tuple(replace(c, **change) if c.label else c for c in sample.candidates)
    return replace(sample, candidates=candidates)


def with_provenance(sample: Sample, **more: object) -> Sample:
    return replace(sample, provenance={**sample.provenance, **more})


BASE = make_sample(1)
TARGET = next(c for c in BASE.candidates if c.label)
NEGATIVE = next(c for c in BASE.candidates if not c.label)
LEAKED = with_provenance(BASE, history=["a", TARGET.item, "b"])


@pytest.mark.parametrize(
    ("sample", "faults"),
    [
        (BASE, set()),
        (LEAKED, {"the target stands in the history"}),
        (
            with_provenance(LEAKED, nodes=[["block", 0, 2, "key"]]),
            {"the target stands in the history", "the target is among the items that the summary was made from"},
        ),
        (with_provenance(LEAKED, nodes=[["block", 2, 3, "key"]]), {"the target stands in the history"}),
        (with_provenance(BASE, history=[NEGATIVE.item]), {"a negative stands in the history"}),
        (with_target(BASE, text=BASE.recent[0].upper() + "!"), {"the target's text is among the recent items"}),
        (
            replace(with_target(BASE, text="Title: one two Three four"), summary="So: title one, two three (four)."),
            {"the target's text stands in the summary"},
        ),
        (with_target(BASE, text=NEGATIVE.text), {"a positive and a negative have the same text"}),
        (with_target(BASE, item=NEGATIVE.item), {"a candidate is listed twice"}),
        (with_target(BASE, text=" "), {"a candidate has no text"}),
        (with_target(BASE, label=0), {"there is no positive"}),
        (replace(BASE, candidates=(TARGET,)), {"there is no negative"}),
        (replace(BASE, provenance={}), {"the provenance holds no history"}),
    ],
)
def test_faults_of_single_samples(sample: Sample, faults: set[str]) -> None:
    assert set(sample_faults(sample)) == faults


def other_user(sample: Sample, user: str) -> Sample:
    return replace(sample, user=user)


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        (lambda samples: samples, 0, "nothing wrong was found"),
        (lambda s: [*s[:8], other_user(s[0], "user/9")], 0, "1 users whose summary, recent items and targets equal"),
        (
            lambda s: [*s[:8], other_user(s[8], "user/0")],
            1,
            "1 samples of users who stand twice or more (such as 'user/0')",
        ),
        (lambda s: [LEAKED, *s[1:]], 1, "1 users where the target stands in the history (such as 'user/1')"),
    ],
)
def test_what_is_wrong_within_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable, status: int, message: str
) -> None:
    samples = change([make_sample(number) for number in (0, *range(2, 10))])
    shards = write_split(tmp_path / "train", samples, (5, 4))
    assert inspect_shards(shards.folder, Options(verify=True)) == status
    assert message in capsys.readouterr().out


def test_what_splits_have_in_common(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [make_sample(number) for number in range(12)]
    long_text = "category: news; title: the storm of the year has reached the harbor at last tonight"
    samples[0] = with_target(samples[0], text=long_text)
    samples[10] = with_target(samples[10], text=long_text.upper() + "!")
    write_split(tmp_path / "train", samples[:8], (8,))
    write_split(tmp_path / "test", samples[8:], (4,), "test")
    assert inspect_shards(tmp_path, Options()) == 0
    out = capsys.readouterr().out
    assert "warning: train and test: 1 targets of 1 users of test have nearly the text of another item" in out
    write_split(tmp_path / "test", [*samples[8:], samples[3]], (5,), "test")
    assert inspect_shards(tmp_path, Options()) == 1
    assert "error: train and test: 1 users stand in both (such as 'user/3')" in capsys.readouterr().out


def test_near_duplicates_are_those_that_comparing_all_pairs_finds() -> None:
    draw = random_stream("texts")
    texts = {f"i{n}": [f"w{draw.randrange(40)}" for _ in range(draw.randint(1, 25))] for n in range(150)}
    for n in range(60):  # with a word more or less
        words = texts[f"i{n}"]
        texts[f"j{n}"] = [*words, "more"] if n % 2 else words[: len(words) - n % 3]
    probes = {item: " ".join(words) for item, words in texts.items()}
    found = near_duplicates(probes, probes)

    def similarity(one: str, other: str) -> float:
        first, second = set(texts[one]), set(texts[other])
        return len(first & second) / len(first | second) if first | second else 1.0

    expected = {one for one in texts if any(one != other and similarity(one, other) >= 0.9 for other in texts)}
    assert set(found) == expected and 20 < len(expected) < len(texts)
    assert all(similarity(*pair) >= 0.9 for pair in found.items())


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert user_auc([3], [1, 2, 3, 4]) == (1 + 1 + 0.5 + 0) / 4
    assert user_auc([5, 1], [3]) == 0.5


@pytest.mark.parametrize(
    ("split", "drawn_by_clicks", "auc"),
    [("train", False, 0.5), ("train", True, 1), ("test", False, 1), ("test", True, 1)],
)
def test_shortcuts_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, drawn_by_clicks: bool, auc: float
) -> None:
    """Every target was clicked once more than its negatives: in train that may be its own click."""
    samples = [make_sample(number) for number in range(9)]
    numbers = {c.item: (1 + c.label, 0 if c.label else 1000) for sample in samples for c in sample.candidates}
    shards = write_split(tmp_path / split, samples, (9,))
    inspect_shards(shards.folder, Options(items=ItemFacts(numbers, drawn_by_clicks)))
    out = capsys.readouterr().out
    assert f"AUC              {auc:.3f} +- 0.000 by popularity" in out
    assert ("popularity alone tells positives from negatives" in out) == (auc == 1)
    assert "item age (newer is higher) alone tells positives from negatives (AUC 1.000)" in out


def test_few_users_who_differ_by_chance_are_no_shortcut() -> None:
    shortcuts = Shortcuts(ItemFacts({"a": (1, 0), "b": (2, 0)}, False), is_train=False)
    for items in ("ab", "ba", "ab"):
        shortcuts.add([Candidate(items[0], "", 1), Candidate(items[1], "", 0)])
    popularity = shortcuts.measured[0]
    assert len(shortcuts.measured) == 1 and popularity.auc == pytest.approx(1 / 3) and not popularity.separates


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A prepared run with shards of its train and test users."""
    folder = tmp_path_factory.mktemp("inspect")
    write_jsonl(folder, user_records(40))
    assert prepare(make_config(folder, "jsonl")) == 0
    run = RunFolder(folder / "run")
    store = HistoryStore(run.histories)
    for split in ("train", "test"):
        samples = [stored_sample(store, split, i) for i in range(store.num_users(split))]
        write_split(run.split(split), samples, (len(samples),), split)
    byte_level().save_pretrained(run.base)
    return run


def stored_sample(store: HistoryStore, split: str, index: int) -> Sample:
    row, items = store.user(split, index), store.catalogue
    recent = tuple(items.text(i) for i in row.history[-3:])
    history = {"history": [items.id(i) for i in row.history]}
    return Sample(row.user, "Would the user choose it?", "likes things", recent, store.candidates(row), history)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/inspect_shards.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_on_a_whole_run(run: RunFolder) -> None:
    config = run.root.parent / "config.yaml"
    done = call(run.shards, "--verify", "--config", config, f"run.dir={run.root}", "model.name_or_path=RUN/base")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("AUC ", "token lengths ", "first epoch ", "trimmed users ", "the same", "sample 0, user", "label 1"):
        assert words in done.stdout, words
    assert "left out" not in done.stdout
    assert "choose it?" in done.stdout, "prompts are decoded from their token ids"


def test_command_without_a_tokenizer_says_what_it_leaves_out(run: RunFolder) -> None:
    done = call(run.split("test"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: token lengths, trims and steps" in done.stdout
    assert "left out: comparisons between splits" in done.stdout
    assert "AUC " in done.stdout


def test_command_on_damage(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (5,))
    flip_byte(shards.path(0), 700)
    done = call(tmp_path, "--index", "--verify")
    assert done.returncode == 1 and "train-000000.tar: sample 0 (byte 512): checksum" in done.stdout


def test_index_option_and_folders_without_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"no shards \(\*\.tar\) here or one level below"):
        inspect_shards(tmp_path, Options())
    shards = make_split(tmp_path / "train", (5,))
    index_path(shards.path(0)).unlink()
    assert inspect_shards(tmp_path, Options()) == 1
    assert "tar.index: missing" in capsys.readouterr().out
    assert inspect_shards(tmp_path, Options(index=True)) == 0


def test_damaged_lengths_are_found(tmp_path: Path) -> None:
    shards = make_split(tmp_path / "train", (5, 4))
    folder = measure_lengths(shards, make_builder()).folder
    assert problems(shards.folder) == []
    flip_byte(folder / "train-000001.tar.lengths", 60)
    assert any("train-000001.tar.lengths: damaged" in problem for problem in problems(shards.folder))
