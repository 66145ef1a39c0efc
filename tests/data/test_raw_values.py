"""Raw data as people have it: units and forms of times, repeats, compressed files, fields that nobody asked for."""

import bz2
import gzip
import json
import lzma
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.data.raw import (
    NUM_ITEMS,
    make_config,
    news_line,
    user_records,
    write_amazon,
    write_jsonl,
    write_mind,
)
from tests.data.test_bad_input import Edit, append, record, refused, replace
from tests.data.test_prepare import ids, manifest, run, users_of
from trsr_dist.data.prepare import build_reader, prepare
from trsr_dist.data.source import Counts, LineReader, find_raw, open_raw
from trsr_dist.errors import ConfigError, DataError
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.job import summarize

START = 1600000000
"""2020-09-13 12:26:40 UTC."""
DAY = 86400


def interactions(*times: object) -> list[dict[str, Any]]:
    """Of one user, who clicks N1, N2, ..."""
    return [{"user": "u", "item": f"N{i}", "time": time} for i, time in enumerate(times, 1)]


def only_user(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> tuple[list[str], list[str], int]:
    """History, targets and time of the one user of these interactions."""
    write_jsonl(folder, rows)
    store = run(folder, "jsonl", *overrides)
    row = users_of(store)["u"][1]
    candidates = ids(store, row.candidates)
    return ids(store, row.history), [c for c, n in zip(candidates, row.labels, strict=True) if n], row.time


DAYS = {13: "Sun", 14: "Mon", 15: "Tue", 16: "Wed"}
SECONDS = [START + DAY * i for i in range(4)]
TIMES: dict[str, list[object]] = {
    "milliseconds": [second * 1000 for second in SECONDS],
    "milliseconds, then seconds": [second * 1000 for second in SECONDS[:2]] + SECONDS[2:],
    "every unit": [SECONDS[0] * 10**9, SECONDS[1] * 10**6, str(SECONDS[2] * 1000), SECONDS[3]],
    "numbers as text": [f"{second}.0" for second in SECONDS],
    "Goodreads": [f"{day} Sep {n} 04:26:40 -0800 2020" for n, day in DAYS.items()],
    "with UTC": [f"2020-09-{n} 12:26:40 UTC" for n in range(13, 17)],
    "date": [f"{day} Sep {n} 12:26:40 UTC 2020" for n, day in DAYS.items()],
    "mail": [f"{day}, {n} Sep 2020 12:26:40 GMT" for n, day in DAYS.items()],
}


@pytest.mark.parametrize("form", TIMES)
def test_times_of_every_unit_and_form(tmp_path: Path, form: str) -> None:
    rows = interactions(*TIMES[form])
    assert only_user(tmp_path, rows) == (["N1", "N2", "N3"], ["N4"], SECONDS[3])


def test_other_units_are_counted(tmp_path: Path) -> None:
    only_user(tmp_path, interactions(*TIMES["every unit"]))
    counts = manifest(tmp_path)["counts"]
    assert [counts[f"times_in_{unit}seconds"] for unit in ("milli", "micro", "nano")] == [1, 1, 1]


def test_any_form_of_times_can_be_named(tmp_path: Path) -> None:
    rows = interactions("14.09.2020 12:26", "13.09.2020 12:26", "16.09.2020 12:26", "15.09.2020 12:26")
    history, target, time = only_user(tmp_path, rows, "data.time_format='%d.%m.%Y %H:%M'")
    assert (history, target, time) == (["N2", "N1", "N4"], ["N3"], START + 3 * DAY - 40)
    with pytest.raises(DataError, match=r"jsonl:1: time '14\.09\.2020 12:26', expected .*data\.time_format"):
        prepare(make_config(tmp_path, "jsonl"), force=True)
    with pytest.raises(ConfigError, match=r"data\.time_format='%Q': .*expected such as"):
        prepare(make_config(tmp_path, "jsonl", "data.time_format='%Q'"))
    with pytest.raises(ConfigError, match=r"data\.time_format is for data\.format=jsonl"):
        prepare(make_config(tmp_path, "mind", "data.time_format='%Y'"))


def test_a_number_that_is_text_has_no_other_form_than_the_named_one(tmp_path: Path) -> None:
    """As in CSV files, whose cells are all text: the error does not say that such a number would do."""
    form = "data.time_format='%d.%m.%Y %H:%M'"
    with pytest.raises(DataError, match=r"time '1600000000', expected a time as data\.time_format='[^']*'; repair"):
        only_user(tmp_path, interactions("1600000000"), form)
    with pytest.raises(DataError, match=r"time None, expected a time as data\.time_format='[^']*' or Unix seconds;"):
        only_user(tmp_path, interactions(None), form)


def test_a_form_with_an_offset_can_be_named(tmp_path: Path) -> None:
    rows = interactions("13.09.20 14:26 +0200", "13.09.20 11:26 -0100", "13.09.20 13:26 +0000", "13.09.20 10:00 -0800")
    form = "data.time_format='%d.%m.%y %H:%M %z'"
    assert only_user(tmp_path, rows, form) == (["N1", "N2", "N3"], ["N4"], START - 40 + 5 * 3600 + 34 * 60)


@pytest.mark.parametrize("form", ["", "data.time_format='%a %b %d %H:%M:%S %Z %Y'"])
def test_a_zone_is_no_other_one_on_a_machine_that_knows_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    rows = interactions(*(f"Sun Sep 13 12:26:4{n} {zone} 2020" for n, zone in enumerate(["UTC", "gmt", "UTC", "EDT"])))
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        with pytest.raises(DataError, match=r"jsonl:4: time 'Sun Sep 13 12:26:43 EDT 2020', expected "):
            only_user(tmp_path, rows, *[form] * bool(form))
    finally:
        monkeypatch.undo()
        time.tzset()


def test_exact_repeats_count_once_and_are_counted(tmp_path: Path) -> None:
    one, two, three, four = interactions(*SECONDS)
    later = {**one, "time": SECONDS[2]}
    other = {**two, "user": "v"}
    rows = [four, two, later, two, three, four, one, other, {**other, "item": "N5", "time": SECONDS[3]}, two]
    write_jsonl(tmp_path, rows)
    store = run(tmp_path, "jsonl")
    users = users_of(store)
    assert ids(store, users["u"][1].history) == ["N1", "N2", "N1", "N3"], "at another time it is no repeat"
    assert ids(store, users["v"][1].history) == ["N2"]
    assert manifest(tmp_path)["counts"]["repeated_interactions"] == 3


def test_fields_that_are_not_chosen_are_not_read(tmp_path: Path) -> None:
    extra = {"images": [{"thumb": "t"}], "details": {"Brand": "Acme"}, "category": {"name": "c"}}
    items = [{"id": f"N{i}", "title": f"thing {i}", **extra} for i in range(NUM_ITEMS)]
    items[5]["category"] = ["a", "b"]
    write_jsonl(tmp_path, user_records(), items)
    catalogue = run(tmp_path, "jsonl", "data.item_fields=[title]").catalogue
    assert (catalogue.text(3), catalogue.category(3), catalogue.category(5)) == ("title: thing 3", "", "a, b")
    with pytest.raises(DataError, match="holds an object.*data.item_fields"):
        prepare(make_config(tmp_path, "jsonl"), force=True)


def test_ids_are_the_same_with_blanks_around_them_in_every_format(tmp_path: Path) -> None:
    rows = user_records()
    write_jsonl(tmp_path / "j", [{**row, "user": f" {row['user']}", "target": f"{row['target']} "} for row in rows])
    write_mind(tmp_path / "m")
    (tmp_path / "m/raw_files/news.tsv").write_text(
        "".join(f" {news_line(i)}".replace("\t", " \t", 1) for i in range(60))
    )
    raw = write_amazon(tmp_path / "a")
    (raw / "sessions_train.csv").write_text((raw / "sessions_train.csv").read_text().replace(",UK", " , UK "))
    assert users_of(run(tmp_path / "j", "jsonl")).keys() == {row["user"] for row in rows}
    assert len(users_of(run(tmp_path / "m", "mind"))) == 24
    assert len(users_of(run(tmp_path / "a", "amazon_m2", "data.locale=UK"))) == 18


def test_mind_with_header_rows(tmp_path: Path) -> None:
    raw = write_mind(tmp_path)
    columns = "news_id\tCategory\tsubcategory\ttitle\tabstract\turl\ttitle_entities\tabstract_entities\n"
    for name, header in (
        ("news.tsv", columns),
        ("behaviors.tsv", "impressionId\tuserId\ttime\thistory\timpressions\n"),
    ):
        (raw / name).write_text(header + (raw / name).read_text())
    store = run(tmp_path, "mind")
    assert len(store.catalogue) == NUM_ITEMS
    assert store.catalogue.id(0) == "N0"
    assert manifest(tmp_path)["counts"]["header_rows"] == 2
    assert len(users_of(store)) == 24


def test_the_share_of_unknown_items_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = user_records()
    for row in rows:
        row["history"][:3] = ["x", "y", "z"]
    write_jsonl(tmp_path, rows)
    run(tmp_path, "jsonl", "data.unknown_items=skip")
    # 24 users with 5 items before the target, the target and 3 shown: 72 of 216.
    said = "interactions.jsonl: 72 of 216 item ids (33.3%) are not in items.jsonl"
    assert said in capsys.readouterr().out
    with pytest.raises(DataError) as caught:
        prepare(make_config(tmp_path, "jsonl", "data.unknown_items=skip", "data.min_history=3"), force=True)
    assert said in str(caught.value)
    assert str(caught.value).index(said) < str(caught.value).index("no user is left")


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_are_read_under_either_name(tmp_path: Path, ending: str) -> None:
    expected = None
    for name in ("plain", "renamed", "named"):
        raw = write_jsonl(tmp_path / name, user_records())
        for path in list(raw.iterdir()) if name != "plain" else []:
            content = path.read_bytes()
            path.unlink()
            target = path if name == "renamed" else path.with_name(path.name + ending)
            target.write_bytes(COMPRESS[ending](content))
        users = users_of(run(tmp_path / name, "jsonl"))
        expected = expected or users
        assert users == expected and len(users) == 24


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_that_is_cut_off(tmp_path: Path, ending: str) -> None:
    raw = write_jsonl(tmp_path, user_records(400))
    content = COMPRESS[ending]((raw / "interactions.jsonl").read_bytes())
    (raw / "interactions.jsonl").write_bytes(content[: len(content) // 2])
    refused(tmp_path, raw, lambda raw: None, "jsonl", r"interactions\.jsonl: cannot be read beyond line \d+")


def test_two_texts_of_an_item_by_policy(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path, user_records())
    append("items.jsonl", record(id="N3", text="another text"))(raw)
    store = run(tmp_path, "jsonl", "data.duplicate_items=first")
    assert (len(store.catalogue), store.catalogue.text(3)) == (NUM_ITEMS, "Thing 3")
    assert manifest(tmp_path)["counts"]["further_texts_of_an_item"] == 1
    with pytest.raises(DataError, match=r"items\.jsonl:61: item 'N3' stands here .*data\.duplicate_items=first"):
        prepare(make_config(tmp_path, "jsonl"), force=True)


def test_zero_width_characters_are_no_text_and_symbols_are(tmp_path: Path) -> None:
    items = [{"id": f"N{i}", "text": ("?", "!!!", "★★★", "…")[i % 4]} for i in range(NUM_ITEMS)]
    raw = write_jsonl(tmp_path, user_records(), items)
    assert run(tmp_path, "jsonl").catalogue.text(2) == "★★★"
    assert summarize(make_config(tmp_path, "jsonl")) == 0
    shards = ShardSet(tmp_path / "run" / "shards" / "train")
    summaries = [shards.read(i).summary for i in range(len(shards))]
    assert len(summaries) > 5
    assert all(set(summary) & set("?!★…") for summary in summaries)
    append("items.jsonl", record(id="empty", title="\u200b\ufeff"))(raw)
    with pytest.raises(DataError, match="item 'empty' has no text"):
        prepare(make_config(tmp_path, "jsonl"), force=True)


def write(name: str, content: str | bytes) -> Edit:
    def edit(raw: Path) -> None:
        (raw / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return edit


DEEP = "[" * 100000 + "]" * 100000
BAD: dict[str, tuple[Edit, str]] = {
    "5,000 digits": (
        append("items.jsonl", f'{{"id": {"7" * 5000}, "text": "t"}}\n'),
        r"items\.jsonl:61: not valid JSON",
    ),
    "deep brackets": (
        append("items.jsonl", f'{{"id": "x", "text": {DEEP}}}\n'),
        r"items\.jsonl:61: not valid JSON .*br",
    ),
    "lists within lists": (
        append("items.jsonl", f'{{"id": "x", "text": {"[" * 400 + "1" + "]" * 400}}}\n' * 2),
        r"items\.jsonl:6\d: ",
    ),
    "key twice": (
        append("items.jsonl", '{"id": "x", "text": "a", "text": "b"}\n'),
        r"items\.jsonl:61: not valid JSON \(the key 'text' stands twice\)",
    ),
    "a list in one line": (write("items.jsonl", json.dumps([{"id": "a"}])), r"items\.jsonl:1: .*one JSON doc.*jq -c"),
    "a list in many lines": (
        write("interactions.jsonl", json.dumps([{"user": "a"}], indent=1)),
        r"interactions\.jsonl:1: this is one JSON document.*jq -c",
    ),
    "Python literals": (
        write("items.jsonl", "{'id': 'a', 'text': None}\n"),
        r"items\.jsonl:1: Python literals.*python -c",
    ),
    "Parquet": (write("items.jsonl", b"PAR1\x15\x04"), r"items\.jsonl: a Parquet file"),
    "ZIP": (write("items.jsonl", b"PK\x03\x04\x14\x00"), r"items\.jsonl: a ZIP archive"),
    "no items": (write("items.jsonl", "\n"), r"items\.jsonl: holds no item"),
    "blank id": (append("items.jsonl", record(id=" ", text="x")), r"items\.jsonl:61: id holds ' ', expected an id"),
    "pipe": (
        lambda raw: _make_pipe(raw / "items.jsonl"),
        r"items\.jsonl: a pipe, socket or device, expected a plain file",
    ),
}


def _make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("case", BAD)
def test_bad_json_lines(tmp_path: Path, case: str) -> None:
    edit, message = BAD[case]
    refused(tmp_path, write_jsonl(tmp_path, user_records()), edit, "jsonl", message)


@pytest.mark.skipif(os.geteuid() != 0, reason="changes its user")
def test_files_that_may_not_be_read_are_named(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path, user_records())
    reader = build_reader(make_config(tmp_path, "jsonl"), tmp_path, LineReader("fail", Counts()))
    raw.chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(DataError, match=r"items\.jsonl: may not be read; ask its owner for permission"):
            next(reader.items())
        assert find_raw(raw, "items.jsonl").name == "items.jsonl"
    finally:
        os.seteuid(0)


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300):
        with pytest.raises(DataError, match="cannot be read"):
            open_raw(tmp_path / name)
    with pytest.raises(DataError, match="missing .found there: no folder that can be read"):
        open_raw(tmp_path / "nowhere" / "items.jsonl")


def test_empty_news_are_named(tmp_path: Path) -> None:
    refused(tmp_path, write_mind(tmp_path), write("news.tsv", ""), "mind", r"news\.tsv: holds no item")


def test_doubled_columns_are_refused(tmp_path: Path) -> None:
    edit = replace("products_train.csv", b"title,price", b"title,title")
    refused(tmp_path, write_amazon(tmp_path), edit, "amazon_m2", r"products_train\.csv:1: column 'title' stands twice")


def test_escapes_in_columns_are_printed_escaped(tmp_path: Path) -> None:
    replace("sessions_train.csv", b"next_item", b"\x1b[2J" + b"x" * 1000)(write_amazon(tmp_path))
    with pytest.raises(DataError) as caught:
        prepare(make_config(tmp_path, "amazon_m2"))
    assert r"found prev_items, '\x1b[2Jxxx" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 800


def test_escapes_in_bad_values_are_printed_escaped(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path, user_records())
    whole = (raw / "interactions.jsonl").read_text()
    for fields in ({"history": ["N1", "\x1b[2J"], "target": "N2"}, {"history": ["N1"], "\x1b[2J": "N2"}):
        (raw / "interactions.jsonl").write_text(whole + record(user="\x1b[2J", **fields))
        with pytest.raises(DataError) as caught:
            prepare(make_config(tmp_path, "jsonl"))
        assert "\x1b" not in str(caught.value)
        assert r"\x1b[2J" in str(caught.value)
