"""The words of messages, comments and documents are those of the field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("trsr_dist", "benchmarks", "launch", "tools", "tests", "slurm", "docs", "configs", "ds_configs")
SUFFIXES = (".py", ".md", ".sh", ".sbatch", ".yaml", ".toml", ".json")
INSTEAD = {
    r"anew": "again, rebuild, from the start",
    r"mend(s|ed|ing)?": "fix, repair",
    r"hindrances?": "reason, obstacle",
    r"knocks?": "ping, report",
    r"tombs?": "marker",
    r"aloud": "with a warning",
    r"see there": "what it is",
    r"give leave": "permit",
    r"reckon\w*": "count, assume, estimate",
    r"so many": "this number of, this many",
    r"of its own": "separate, another",
}


def written() -> list[Path]:
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return [*paths, *ROOT.glob("*.md"), ROOT / "Makefile"]


@pytest.mark.parametrize("word", INSTEAD)
def test_words_that_the_field_does_not_use(word: str) -> None:
    spelled = word.replace(" ", "[ _]")  # names of tests too
    pattern = re.compile(rf"(?<![^\W_]){spelled}(?![^\W_])", re.IGNORECASE)
    found = []
    for path in written():
        if path != Path(__file__):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [
                f"{path.relative_to(ROOT)}:{i + 1}: {line.strip()}"
                for i, line in enumerate(lines)
                if pattern.search(line)
            ]
    assert not found, f"say {INSTEAD[word]}"
