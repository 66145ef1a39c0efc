"""Splits, manifests and samples of unusual or foreign make are described or named, not crashed on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.shards.world import make_sample, make_split, write_split
from trsr_dist.errors import DataError
from trsr_dist.shards.codec import decode_sample, encode_sample
from trsr_dist.shards.inspect.checks import NO_HISTORY, sample_faults
from trsr_dist.shards.inspect.job import Options, inspect_shards
from trsr_dist.shards.inspect.verify import index_split

ROOT = Path(__file__).parents[2]


def test_an_empty_split_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_split(tmp_path / "shards" / "train", [make_sample(i) for i in range(4)], [4])
    write_split(tmp_path / "shards" / "valid", [], [], "valid")
    inspect_shards(tmp_path / "shards", Options(False, False, 0, None, None))
    assert "valid: 0 users in 0 shards" in capsys.readouterr().out


def test_a_manifest_of_another_program(tmp_path: Path) -> None:
    folder = make_split(tmp_path / "train", (3,)).folder
    (folder / "manifest.json").write_text('{"files": []}')
    with pytest.raises(DataError, match="names no shards"):
        index_split(folder)


def test_provenance_of_other_programs_is_no_history() -> None:
    def faults(**provenance: object) -> list[str]:
        return list(sample_faults(replace(make_sample(1), provenance=provenance)))

    assert NO_HISTORY in faults(history=[{"id": 1}]) and NO_HISTORY in faults(history="N1")
    assert NO_HISTORY not in faults(history=["x"], nodes=[["a"], 3])


def test_half_a_character_in_a_sample() -> None:
    data = encode_sample(make_sample(1)).replace(b'"summary":"', b'"summary":"\\ud83d')
    with pytest.raises(DataError, match="without its second half"):
        decode_sample(data)


def test_overrides_need_a_config(tmp_path: Path) -> None:
    command = [sys.executable, "tools/inspect_shards.py", str(tmp_path), "prompt.max_tokens=200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "give --config FILE" in done.stderr
