"""The GPU's tests and benchmarks in one report, with date, device and versions."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trsr_dist.benchmarks.common import as_json, load_suite, markdown
from trsr_dist.errors import RunError
from trsr_dist.files import atomic_file, write_json

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "flash-attn", "bitsandbytes", "vllm", "webdataset")
ROOT = Path(__file__).parents[2]
TEST_SECONDS = 360
NAME = "gpu_results"


def check_gpu(output: Path, scale: float) -> int:
    """Run all that needs a GPU; returns 0 when every test passed.

    Raises:
        RunError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RunError("no GPU is visible to PyTorch; run this on a GPU node, with the CUDA build of torch")
    tests = run_tests()
    rows = load_suite("gpu")(scale)
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "versions": {name: installed(name) for name in PACKAGES},
        "tests": tests,
        "rows": [as_json(row) for row in rows],
    }
    write_json(output / f"{NAME}.json", facts)
    text = page(facts, markdown(rows))
    with atomic_file(output / f"{NAME}.md") as stream:
        stream.write(text)
    print(text)
    return 0 if tests["status"] == 0 else 1


def run_tests() -> dict[str, Any]:
    """The tests of ``tests/gpu``; their last lines say what was skipped, and why."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rsf", "--timeout", str(TEST_SECONDS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * TEST_SECONDS)
    return {"status": done.returncode, "output": done.stdout[-6000:]}


def installed(package: str) -> str:
    """Version of a package; a dash where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def page(facts: dict[str, Any], table: str) -> str:
    """The report as a page."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines = [
        "# What was measured on a GPU",
        "",
        f"{facts['date']}, {facts['device']}. {versions}. Repeat with `make gpu-check`.",
        "",
        "## Tests",
        "",
        "```",
        facts["tests"]["output"].strip(),
        "```",
        "",
        "## Benchmarks",
        "",
        table,
        "",
    ]
    return "\n".join(lines)
