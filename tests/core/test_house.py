"""The measures of a package, on one small enough to count by hand."""

from pathlib import Path

from tests.core.house import longest_chain, measures, read_package, single_importers

ROOT = Path(__file__).parents[2]
LONGEST_CHAIN = 10
"""Modules each of which imports the next."""
FILES = {
    "__init__.py": "",
    "top.py": "from pack import middle\n\n\ndef one():\n    from .deep.low import two\n    return two()\n\n",
    "middle.py": "import pack.deep.low\n\n\nclass A:\n    def of(self):\n        return 1\n",
    "deep/__init__.py": "'Five lines.'\n#\n#\n#\n#\n",
    "deep/low.py": "if TYPE_CHECKING:\n    from pack.top import one\nfrom ..middle import A\n\n\ndef two(): return 2\n",
    "tests/test_top.py": "import pack.top\n" * 5,
}


def make_package(folder: Path) -> Path:
    for name, text in FILES.items():
        path = folder / "pack" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "pack"


def test_a_small_package_by_hand(tmp_path: Path) -> None:
    modules = read_package(make_package(tmp_path))
    assert list(modules) == ["pack.deep", "pack.deep.low", "pack.middle", "pack.top"]
    assert {name: module.imports for name, module in modules.items()} == {
        "pack.deep": set(),
        "pack.deep.low": {"pack.middle"},
        "pack.middle": {"pack.deep.low"},
        "pack.top": {"pack.middle", "pack.deep.low"},
    }
    assert longest_chain(modules) == ["pack.top", "pack.deep.low"], "two in a circle are one step"
    assert single_importers(modules) == []
    assert list(measures(modules))[:4] == [
        "modules / lines               4 / 24",
        "file median / p90 / max       6 / 6 / 7",
        "function median / p90 / max   2 / 2 / 3",
        "functions per 1,000 lines     125.0",
    ]


def test_the_package_keeps_to_its_limits() -> None:
    lines = list(measures(modules := read_package(ROOT / "trsr_dist")))
    assert len(longest_chain(modules)) <= LONGEST_CHAIN, lines
    assert {"functions over 60 lines: 0", "files over 400 lines: 0"} <= set(lines), lines


def test_what_is_long_is_listed(tmp_path: Path) -> None:
    folder = make_package(tmp_path)
    (folder / "long.py").write_text("from pack import deep\ndef f():\n" + "    pass\n" * 60 + "#\n" * 400)
    lines = list(measures(read_package(folder)))
    assert lines[-4:] == [
        "functions over 60 lines: 1",
        "  pack.long.f: 61",
        "files over 400 lines: 1",
        "  pack.long: 462",
    ]
    assert "     5 pack.deep < pack.long" in lines
    low = read_package(folder / "deep")
    assert "pack.deep.low" in low and low["pack.deep.low"].imports == set(), "what lies outside the folder is left out"
