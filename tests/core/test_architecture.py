"""Promises of the structure: what may import what, and who reads the environment."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "trsr_dist"
HEAVY = ("torch", "deepspeed", "transformers", "peft", "webdataset", "matplotlib")
PURE = [
    "trsr_dist.records",
    "trsr_dist.errors",
    "trsr_dist.hashing",
    "trsr_dist.rows",
    "trsr_dist.words",
    "trsr_dist.config",
    "trsr_dist.environment",
    "trsr_dist.prompts.builder",
    "trsr_dist.shards.measure",
    "trsr_dist.shards.plan",
    "trsr_dist.planner.job",
]
LAYERS = [
    "data",
    "prompts",
    "shards",
    "summarize",
    "base",
    "model",
    "train",
    "merge",
    "evaluate",
    "planner",
    "predict",
]
MAY_IMPORT = {
    "prompts": set(),
    "data": {"prompts"},
    "shards": {"prompts"},
    "summarize": {"prompts", "data", "shards"},
    "base": {"prompts", "data", "shards"},
    "model": {"prompts", "shards", "data"},
    "planner": {"prompts", "shards", "data", "summarize", "model", "evaluate"},
    "train": {"planner", "prompts", "shards", "model", "evaluate"},
    "merge": {"prompts", "shards", "model"},
    "evaluate": {"prompts", "shards", "data", "summarize", "model"},
    "predict": {"prompts", "shards", "summarize", "model", "merge", "evaluate"},
}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_pure_modules_load_no_heavy_library() -> None:
    code = f"import sys\nfor name in {PURE!r}: __import__(name)\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("layer", LAYERS)
def test_stages_import_only_what_stands_before_them(layer: str) -> None:
    for path in (PACKAGE / layer).rglob("*.py"):
        used = {name.split(".")[1] for name in imports_of(path) if name.startswith("trsr_dist.")}
        above = (used & set(LAYERS)) - MAY_IMPORT[layer] - {layer}
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


def test_the_config_knows_no_stage() -> None:
    for path in (PACKAGE / "config").glob("*.py"):
        assert not {name.split(".")[1] for name in imports_of(path) if name.startswith("trsr_dist.")} & set(LAYERS)


def test_the_package_needs_no_benchmarks() -> None:
    """They are not installed."""
    for path in PACKAGE.rglob("*.py"):
        assert not {name for name in imports_of(path) if name.split(".")[0] == "benchmarks"}, path


def test_one_module_reads_the_environment() -> None:
    for folder in ("trsr_dist", "benchmarks", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            used = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
            assert path.name == "environment.py" or not used & {"environ", "getenv"}, path


def test_entry_points_stay_thin() -> None:
    for path in [*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 80, f"{path.name} holds logic"


READERS = {"from_pretrained", "from_config", "load_peft_weights", "load_adapter"}
"""Of transformers and PEFT: what they read is decided in one place."""


def test_one_module_has_libraries_read_models() -> None:
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
        if path.name != "pretrained.py":
            used = {ast.unparse(call.func) for call in calls if call.func.attr in READERS} - {"ModelShape.from_config"}
            named = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
            assert not used and not {name for name in named if name.startswith("Auto") or name in READERS}, path
        for call in calls:
            if ast.unparse(call.func) == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("weights_only") == "True", f"{path} reads a pickle with its code"
            if call.func.attr in READERS and ast.unparse(call.func) != "ModelShape.from_config":
                given = {word.arg for word in call.keywords}
                assert given & {"trust_remote_code", None}, f"{path} lets transformers ask on the terminal"


def test_what_the_architecture_page_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:trsr_dist|tests|launch|tools)/[\w/]+\.py)`", text))
    named |= {f"trsr_dist/{folder}" for folder in re.findall(r"\b(\w+)/(?=[,|])", text)}
    missing = sorted(name for name in named if not (ROOT / name).exists() and not (ROOT / Path(name).name).exists())
    assert len(named) > 20
    assert not missing
