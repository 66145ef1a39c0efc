"""What the comparison of two source trees notices, and what it leaves out."""

import json
from pathlib import Path

import pytest

from tests.equality import differences

STATE = {"step": 2, "seconds": 0.5, "stream": {"row": 4}, "version": "1"}
FILES = {
    "shards/a.tar": b"\0\1\2\3",
    "checkpoints/state.json": STATE,
    "checkpoints/manifest.json": {"files": {"state.json": {"size": 9}, "optimizer": {"size": 8}}},
    "summaries/journal/00000-vm-0123456789ab.journal": b"text",
    "heartbeats/rank-00000.json": {"pid": 1},
    "metrics.jsonl": b'{"step": 1, "train/loss": 2.0, "train/tokens_per_second": 7.0}\n{"loss": NaN}\n',
}


def write(folder: Path, **changed: object) -> Path:
    for name, content in (FILES | changed).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"checkpoints/state.json": STATE | {"seconds": 0.7, "version": "2"}}, []),
        ({"summaries/journal/00000-vm-ba9876543210.journal": b"text"}, []),
        ({"heartbeats/rank-00000.json": {"pid": 2}}, []),
        ({"checkpoints/manifest.json": {"files": {"state.json": {"size": 10}, "optimizer": {"size": 8}}}}, []),
        ({"metrics.jsonl": FILES["metrics.jsonl"].replace(b"7.0", b"8.5")}, []),
        ({"metrics.jsonl": b'{"stage": "summarize", "step": 7}\n' + FILES["metrics.jsonl"]}, []),
        ({"shards/a.tar": b"\0\1\7\3"}, ["shards/a.tar: 4 bytes before, 4 after; first at byte 2"]),
        ({"shards/a.tar": b"\0\1"}, ["shards/a.tar: 4 bytes before, 2 after; one is the other's beginning"]),
        ({"new": b""}, ["new: only after"]),
        (
            {"checkpoints/state.json": STATE | {"stream": {"row": 4.0}, "best": 1}},
            [
                "checkpoints/state.json: .stream.row: '4' before, '4.0' after",
                "checkpoints/state.json: .best: only after",
            ],
        ),
        (
            {"checkpoints/state.json": dict(reversed(STATE.items()))},
            ["checkpoints/state.json: : the keys' order"],
        ),
        (
            {"metrics.jsonl": FILES["metrics.jsonl"].replace(b"2.0", b"2.5")},
            ["metrics.jsonl: [0].train/loss: '2.0' before, '2.5' after"],
        ),
        (
            {"checkpoints/manifest.json": {"files": {"state.json": {"size": 9}, "optimizer": {"size": 9}}}},
            ["checkpoints/manifest.json: .files.optimizer.size: '8' before, '9' after"],
        ),
    ],
)
def test_each_difference_is_one_line(tmp_path: Path, changed: dict, expected: list[str]) -> None:
    before, after = write(tmp_path / "before"), write(tmp_path / "after", **changed)
    if any(name.endswith(".journal") for name in changed):
        (after / "summaries/journal/00000-vm-0123456789ab.journal").unlink()
    assert list(differences(before, after)) == expected
