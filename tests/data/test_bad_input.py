"""Bad raw files: one clear error with file and row, and nothing half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.raw import (
    behavior_line,
    clicks,
    make_config,
    news_line,
    user_records,
    write_amazon,
    write_jsonl,
    write_mind,
)
from trsr_dist.data.prepare import prepare
from trsr_dist.data.published import parse_items
from trsr_dist.data.store import HistoryStore
from trsr_dist.errors import DataError

Edit = Callable[[Path], object]


def append(name: str, text: str) -> Edit:
    def edit(raw: Path) -> None:
        with open(raw / name, "a", encoding="utf-8") as stream:
            stream.write(text)

    return edit


def replace(name: str, old: bytes, new: bytes) -> Edit:
    def edit(raw: Path) -> None:
        content = (raw / name).read_bytes()
        assert old in content
        (raw / name).write_bytes(content.replace(old, new, 1))

    return edit


def record(**fields: object) -> str:
    return json.dumps(fields) + "\n"


def refused(folder: Path, raw: Path, edit: Edit, data_format: str, message: str, *overrides: str) -> None:
    edit(raw)
    with pytest.raises(DataError, match=message):
        prepare(make_config(folder, data_format, *overrides))
    left = [str(path) for path in (folder / "run").rglob("*")] if (folder / "run").exists() else []
    assert left == []


MIND = {
    "missing news": (lambda raw: (raw / "news.tsv").unlink(), r"news\.tsv: missing \(found there: behaviors\.tsv\)"),
    "missing behaviors": (lambda raw: (raw / "behaviors.tsv").unlink(), r"behaviors\.tsv: missing"),
    "short news row": (append("news.tsv", "N98\ta\tb\n"), r"news\.tsv:61: 3 columns, expected 8 \(id, category"),
    "long behaviors row": (
        append("behaviors.tsv", "1\tU98\tt\ta\tb\tc\n"),
        r"behaviors\.tsv:25: 6 columns, expected 5",
    ),
    "unknown item": (
        append("behaviors.tsv", behavior_line(98, ["N1", "N777", "N2"])),
        r"behaviors\.tsv:25: user 'U98' has item 'N777'.*unknown_items=skip",
    ),
    "other text": (
        append("news.tsv", news_line(5).replace("number", "no")),
        r"news\.tsv:61: item 'N5' stands here with another text than in line 6",
    ),
    "not UTF-8": (
        replace("news.tsv", b"number 9\t", b"n\xfcmber 9\t"),
        r"news\.tsv:10: byte 0xfc at position \d+ is not UTF-8.*encoding_errors=replace",
    ),
    "no text": (append("news.tsv", "N98\t\t\t \tAbstract\t\t[]\t[]\n"), r"news\.tsv:61: item 'N98' has no text"),
    "no item id": (append("news.tsv", "\ta\tb\tc\td\t\t[]\t[]\n"), r"news\.tsv:61: the item id is empty"),
    "no user id": (append("behaviors.tsv", "1\t\tt\tN1\tN1-0\n"), r"behaviors\.tsv:25: the user id is empty"),
    "bad time": (
        append("behaviors.tsv", "1\tU98\t2019-11-13\tN1 N2\tN1-0\n"),
        r"behaviors\.tsv:25: time '2019-11-13', expected such as 11/13/2019",
    ),
    "bad impression": (
        append("behaviors.tsv", behavior_line(98, ["N1", "N2"], "N3")),
        r"behaviors\.tsv:25: impression 'N3' is not of the form.*data\.target=last",
        "data.target=impression",
    ),
    "no user": (lambda raw: (raw / "behaviors.tsv").write_text(""), "no user is left"),
}


@pytest.mark.parametrize("case", MIND)
def test_mind(tmp_path: Path, case: str) -> None:
    edit, message, *overrides = MIND[case]
    refused(tmp_path, write_mind(tmp_path), edit, "mind", message, *overrides)


def test_equal_duplicates_and_empty_histories_are_counted(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    append("news.tsv", news_line(5))(raw)
    append("behaviors.tsv", behavior_line(98, []))(raw)
    prepare(make_config(tmp_path, "mind"))
    counts = json.loads((tmp_path / "run" / "histories" / "manifest.json").read_text())["counts"]
    assert (counts["repeated_items"], counts["users_with_empty_history"]) == (1, 1)


def test_rows_without_labels_and_empty_lines_serve_the_last_click(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    append("news.tsv", "\n\r\n")(raw)
    append("behaviors.tsv", behavior_line(98, ["N1", "N2"], "N3 N4") + "\n")(raw)
    prepare(make_config(tmp_path, "mind"))
    counts = json.loads((tmp_path / "run" / "histories" / "manifest.json").read_text())["counts"]
    assert (counts["items_read"], counts["users_read"]) == (60, 25)


def test_too_few_negatives(tmp_path: Path) -> None:
    message = r"user 'U\d+': 54 catalogue items are eligible .*, 55 are needed; lower evaluate\.negatives_per_positive"
    refused(tmp_path, write_mind(tmp_path), lambda raw: None, "mind", message, "evaluate.negatives_per_positive=55")


def test_an_error_leaves_the_older_output_alone(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    prepare(make_config(tmp_path, "mind"))
    folder = tmp_path / "run" / "histories"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    append("news.tsv", "N98\ta\n")(raw)
    with pytest.raises(DataError):
        prepare(make_config(tmp_path, "mind"), force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


AMAZON = {
    "missing column": (
        replace("sessions_train.csv", b"next_item", b"next"),
        r"sessions_train\.csv:1: no column 'next_item'; found prev_items, next, locale",
    ),
    "missing title": (replace("products_train.csv", b"title", b"name"), r"products_train\.csv:1: no column 'title'"),
    "empty file": (lambda raw: (raw / "products_train.csv").write_text(""), "no column 'id'; found nothing"),
    "short row": (append("products_train.csv", "N99,UK\n"), r"products_train\.csv:182: 2 columns, expected 11"),
    "shortened list": (
        append("sessions_train.csv", "\"['N1' 'N2' ... 'N3']\",N4,UK\n"),
        r"sessions_train\.csv:50: prev_items is",
    ),
    "unknown item": (append("sessions_train.csv", "['N1' 'N999'],N4,UK\n"), r"sessions_train\.csv:50: .*'N999'"),
    "open quote": (append("products_train.csv", 'N99,UK,"never ends' + "x" * 140000 + "\n"), "quotation mark"),
    "open quote early": (
        replace("products_train.csv", b",,,,,,", b',,,,,,"6 inch pan'),
        r"\.csv:\d+: .*quotation mark",
    ),
    "carriage returns": (
        lambda raw: (raw / "sessions_train.csv").write_bytes(b"prev_items,next_item,locale\r['N1'],N2,UK\r"),
        r"sessions_train\.csv:1: a carriage return stands outside quotation marks",
    ),
    "cut off in a cell": (append("products_train.csv", 'N99,UK,Lamp,,,,,,,,"A long, des'), "quotation mark"),
}


@pytest.mark.parametrize("case", AMAZON)
def test_amazon(tmp_path: Path, case: str) -> None:
    edit, message = AMAZON[case]
    refused(tmp_path, write_amazon(tmp_path), edit, "amazon_m2", message, "data.locale=UK")


def test_lists_as_numpy_prints_them() -> None:
    assert parse_items("['A' 'B'\n 'C']", "f:1") == ["A", "B", "C"]
    assert parse_items("['A', \"B\"]", "f:1") == ["A", "B"]
    assert parse_items("[]", "f:1") == []
    for text in ("A B", "['A' B]", "['A' ... 'B']", "['A"):
        with pytest.raises(DataError, match="f:1"):
            parse_items(text, "f:1")


JSONL = {
    "not JSON": (append("interactions.jsonl", "{user: 1}\n"), r"interactions\.jsonl:25: not valid JSON"),
    "not an object": (append("items.jsonl", "[1]\n"), r"items\.jsonl:61: found list, expected a JSON object"),
    "no target": (append("interactions.jsonl", record(user=1, history=["N1"])), r":25: no field 'target'"),
    "no id": (append("items.jsonl", record(text="x")), r"items\.jsonl:61: no field 'id'; found text"),
    "id of a wrong type": (append("items.jsonl", record(id=1.5, text="x")), r"id holds 1\.5, expected an id"),
    "history as text": (append("interactions.jsonl", record(user=1, history="N1", target="N2")), "expected a list"),
    "bad time": (
        append("interactions.jsonl", record(user=1, history=["N1"], target="N2", time="noon")),
        r":25: time 'noon', expected Unix seconds",
    ),
    "no time at all": (
        append("interactions.jsonl", '{"user": 1, "history": ["N1"], "target": "N2", "time": NaN}\n'),
        r":25: time nan, expected Unix seconds",
    ),
    "time beyond all": (
        append("interactions.jsonl", record(user=1, history=["N1"], target="N2", time=1e30)),
        r":25: time 1e\+30, expected Unix seconds",
    ),
    "time beyond all, as text": (
        append("interactions.jsonl", record(user=1, history=["N1"], target="N2", time="9" * 30)),
        r":25: time '9{30}', expected Unix seconds",
    ),
    "no interactions": (
        lambda raw: (raw / "interactions.jsonl").unlink(),
        r"interactions\.jsonl: missing .*; set data\.path, or give the file this name",
    ),
    "object as field": (append("items.jsonl", record(id="x", title={"a": 1})), "holds an object"),
    "unknown form": (
        lambda raw: (raw / "interactions.jsonl").write_text(record(user=1, clicks=[])),
        "fields user, clicks; expected user, item, time or user, history, target",
    ),
    "empty file": (lambda raw: (raw / "interactions.jsonl").write_text("\n"), "holds no record"),
    "half a character": (append("items.jsonl", '{"id": "x", "text": "\\ud83d!"}\n'), "without its second half"),
    "no text": (append("items.jsonl", record(id="x", title="", text=None)), "'x' has no text in any field"),
}


@pytest.mark.parametrize("case", JSONL)
def test_jsonl(tmp_path: Path, case: str) -> None:
    edit, message = JSONL[case]
    refused(tmp_path, write_jsonl(tmp_path, user_records()), edit, "jsonl", message)


def test_empty_cells_of_pandas_are_empty_fields(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path, user_records())
    append("items.jsonl", '{"id": "x", "title": "Shoe", "brand": NaN, "tags": [null, "red", NaN]}\n')(raw)
    append("interactions.jsonl", record(user="new", history=["N1"], target="x"))(raw)
    prepare(make_config(tmp_path, "jsonl"))
    catalogue = HistoryStore(tmp_path / "run" / "histories").catalogue
    assert catalogue.text(60) == "title: Shoe; tags: red"
    refused_raw = write_jsonl(tmp_path / "other", user_records())
    edit = append("items.jsonl", '{"id": "y", "title": NaN}\n')
    refused(tmp_path / "other", refused_raw, edit, "jsonl", "'y' has no text")


def test_a_field_that_no_item_has(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path, user_records())
    message = r"items\.jsonl: no item has the field 'brnad'; correct data\.item_fields"
    refused(tmp_path, raw, lambda raw: None, "jsonl", message, "data.item_fields=[text, brnad]")


def test_a_byte_order_mark_before_a_bad_byte(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    news = (raw / "news.tsv").read_bytes()
    (raw / "news.tsv").write_bytes(b"\xef\xbb\xbf" + news.replace(b"Abstract 0", b"Abstract \xff", 1))
    prepare(make_config(tmp_path, "mind", "data.encoding_errors=replace"))
    assert HistoryStore(tmp_path / "run" / "histories").catalogue.id(0) == "N0"


def test_a_long_value_does_not_hide_what_is_said(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    append("behaviors.tsv", behavior_line(98, ["N1", "N2"], "x" * 100_000))(raw)
    with pytest.raises(DataError, match=r"behaviors\.tsv:25: impression 'x+\.\.\.x+' is not of the form") as caught:
        prepare(make_config(tmp_path, "mind", "data.target=impression"))
    assert len(str(caught.value)) < 1000


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path, user_records())
    message = r"items\.jsonl:61: more than 64 MB without a line end"
    refused(tmp_path, raw, lambda raw: os.truncate(raw / "items.jsonl", 1 << 27), "jsonl", message)


def test_interactions_need_times(tmp_path: Path) -> None:
    rows = [{"user": "a", "item": item} for item in clicks(1)]
    refused(tmp_path, write_jsonl(tmp_path, rows), lambda raw: None, "jsonl", r"interactions\.jsonl:1: no field 'time'")
