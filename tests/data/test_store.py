"""The store's files are those that were written, and whole columns say what the rows say."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.raw import make_config, user_records, write_jsonl
from trsr_dist.data.candidates import HELD_OUT
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore, UserRow
from trsr_dist.errors import DataError, TrsrError
from trsr_dist.evaluate.baselines import build_rankers
from trsr_dist.evaluate.users import DrawnLists, StoredSplit, first_times, item_weights, targets_of
from trsr_dist.files import read_json, write_json
from trsr_dist.run import SPLITS
from trsr_dist.summarize.job import summarize

FILES = ("items.arrow", *(f"{split}.arrow" for split in SPLITS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = user_records(60)
    rows[7]["target"] = [rows[7]["target"], "N55", "N56"]
    write_jsonl(tmp_path, rows)
    prepare(make_config(tmp_path, "jsonl"))
    return tmp_path / "run" / "histories"


def flip(path: Path, place: float) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_seen_by_every_stage_that_reads(folder: Path, name: str) -> None:
    flip(folder / name, 0.5)
    config = make_config(folder.parents[1], "jsonl")
    for read in (lambda: HistoryStore(folder), lambda: summarize(config), lambda: prepare(config)):
        with pytest.raises(DataError, match=rf"{name}: damaged: .*run tools/prepare_data\.py --force"):
            read()
    assert not (folder.parent / "shards").exists()
    prepare(config, force=True)
    HistoryStore(folder)


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_missing_or_no_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: cannot be read"):
        HistoryStore(folder)
    (folder / name).mkdir()
    with pytest.raises(DataError, match=name):
        HistoryStore(folder)
    with pytest.raises(DataError, match=name):
        HistoryStore(folder, check=False)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 3}', '{"settings": []}', "{}"])
def test_manifests_that_are_damaged(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(TrsrError, match=r"manifest\.json"):
        HistoryStore(folder)


def test_histories_without_checksums_are_refused(folder: Path) -> None:
    manifest = read_json(folder / "manifest.json")
    del manifest["files"]
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(DataError, match="has no checksums .*--force"):
        HistoryStore(folder)


def rows_of(store: HistoryStore, split: str) -> list[UserRow]:
    return [store.user(split, index) for index in range(store.num_users(split))]


def test_columns_equal_the_rows(folder: Path) -> None:
    store = HistoryStore(folder)
    items, catalogue = range(len(store.catalogue)), store.catalogue
    assert catalogue.column("popularity").tolist() == [catalogue.value(3, item) for item in items]
    assert catalogue.column("first_seen").tolist() == [catalogue.value(4, item) for item in items]
    assert catalogue.strings("text") == [catalogue.text(item) for item in items]
    for split in SPLITS:
        rows = rows_of(store, split)
        for column, of in (("targets", targets_of), ("history", lambda row: row.history)):
            flat = [item for row in rows for item in of(row)]
            assert store.count_items(split, column).tolist() == np.bincount(flat, minlength=len(items)).tolist()
        for most in (3, 50):
            whole = [[*row.history, *targets_of(row)][-most:] for row in rows]
            assert [sequence.tolist() for sequence in store.sequences(split, most)] == whole
    assert max(len(targets_of(row)) for split in SPLITS for row in rows_of(store, split)) == 3


def test_rankers_and_lists_read_columns_not_cells(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = HistoryStore(folder)
    rows = {split: rows_of(store, split) for split in SPLITS}
    expected = np.bincount([item for row in rows["train"] for item in targets_of(row)], minlength=len(store.catalogue))
    held_out = [item for split in ("valid", "test") for row in rows[split] for item in [*row.history, *targets_of(row)]]

    def refuse(*_: object) -> None:
        raise AssertionError("a single cell was read")

    split = StoredSplit(store, "test")
    monkeypatch.setattr("trsr_dist.data.store.ArrowRows.value", refuse)
    rankers = build_rankers(store, ["popularity", "recency", "bm25"], 0, tmp_path).rankers
    items = list(range(len(store.catalogue)))
    assert rankers["recency"]([[0]], [items])[0].tolist() == expected.tolist()
    weights = item_weights("popularity", store, HELD_OUT)
    assert weights.tolist() == np.bincount(held_out, minlength=len(items)).tolist()
    assert first_times(store).min() > 0
    DrawnLists("targets", store, split, 2, seen_before_target=True, seed=0)
