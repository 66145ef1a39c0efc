"""The one reader of JSON, and the files that are read with it."""

import ast
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from trsr_dist.config import load_config
from trsr_dist.errors import DataError
from trsr_dist.files import read_json, sha256_of
from trsr_dist.json_text import parse_json

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Pair:
    left: int
    right: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ('{"a": ', "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON .*out of range"),
        ("[" * 100_000, "not valid JSON .*recursion"),
        ('{"a": "\\ud83d"}', "without its second half"),
        ('{"a": NaN}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": "\xed\xa0\x80"}', "not valid JSON"),
        ("[1]", "a JSON list; expected an object"),
        ("null", "a JSON NoneType; expected an object"),
    ],
    ids=range(10),
)
def test_what_is_no_json_object_is_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "left: field required"),
        ('{"left": "1"}', "left: .*valid integer, found '1'"),
        ('{"left": true}', "left: .*valid integer, found 'True'"),
        ('{"left": 1, "right": [2]}', "right.0: .*valid string, found '2'"),
        ("[]", "the whole: "),
    ],
)
def test_nothing_is_converted(text: str, words: str) -> None:
    assert parse_json('{"left": 1, "right": ["a"], "more": 0}', Pair) == Pair(1, ("a",))
    with pytest.raises(DataError, match=words):
        parse_json(text, Pair)


def test_models_configs_may_hold_infinity(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert read_json(tmp_path / "config.json", finite=False)["time_step_limit"][1] == float("inf")
    with pytest.raises(DataError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")


def test_what_is_no_plain_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    found = []

    def read() -> None:
        for read_one in (read_json, sha256_of):
            for path in (tmp_path / "pipe", tmp_path / "zero", tmp_path):
                with pytest.raises(DataError, match=rf"{path.name}: a (pipe, socket or device|folder), expected"):
                    read_one(path)
                found.append(path)

    reader = threading.Thread(target=read, daemon=True)  # a pipe without a writer would hold it for ever
    reader.start()
    reader.join(20)
    assert len(found) == 6


def test_a_huge_file_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    with open(tmp_path / "huge.json", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(DataError, match=r"huge\.json: 1,099,511,627,776 bytes, expected at most 268,435,456"):
        read_json(tmp_path / "huge.json")
    with pytest.raises(DataError, match=r"huge\.json: 1,099,511,627,776 bytes"):
        load_config(tmp_path / "huge.json")


def test_a_key_that_stands_twice_is_refused_where_people_write() -> None:
    text = '{"a": [{"b": 1, "b": 2}]}'
    assert parse_json(text) == {"a": [{"b": 2}]}
    with pytest.raises(DataError, match="the key 'b' stands twice"):
        parse_json(text, unique=True)


def test_nobody_else_reads_json() -> None:
    """The standard reader raises three kinds of errors and lets NaN and halves of characters through."""
    readers = []
    for folder in ("trsr_dist", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(
                        ast.Attribute(ast.Name("json"), "loads"), [ast.Call(ast.Attribute(ast.Name("json"), "dumps"))]
                    ):
                        continue  # json.loads(json.dumps(value)): what is written
                    case ast.Call(ast.Attribute(ast.Name("json"), "load" | "loads")):
                        readers.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not [place for place in readers if not place.startswith("trsr_dist/data/jsonl")]
