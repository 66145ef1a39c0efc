"""The GPU's tests and benchmarks in one report, with date, device and versions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import gpu
from benchmarks.common import Row, as_json, markdown
from trsr_dist.errors import RunError
from trsr_dist.files import atomic_file, write_json

PACKAGES = (
    *("torch", "deepspeed", "transformers", "peft"),
    *("flash-attn", "bitsandbytes", "liger-kernel", "vllm", "webdataset"),
)
ROOT = Path(__file__).parents[1]
ONE_TEST_SECONDS, TEST_SECONDS, ALL_SECONDS = 160, 280, 480
"""A test is ended after the first, all tests after the second; no measurement begins after the third."""
NAME, TEST_LOG = "gpu_results", "gpu_tests.log"


def check_gpu(output: Path, scale: float, note: str = "") -> int:
    """Run all that needs a GPU. The files are written again after each part, so that an end before time costs little.

    Args:
        output: folder of the files.
        scale: multiplies the rows' length.
        note: stands in the report.

    Returns:
        0 when every test passed and every measurement was made that can be made here.

    Raises:
        RunError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RunError("no GPU is visible to PyTorch; run this on a GPU node, with the CUDA build of torch")
    started = time.monotonic()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "versions": {name: installed(name) for name in PACKAGES},
        "note": note,
        "tests": run_tests(output / TEST_LOG),
    }
    write_results(output, facts, [])
    rows = gpu.run(scale, started + ALL_SECONDS, lambda rows: write_results(output, facts, rows))
    print(page(facts, markdown(rows)))
    return 0 if facts["tests"]["status"] == 0 and gpu.is_complete(rows) else 1


def write_results(output: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """One JSON and one markdown file."""
    write_json(output / f"{NAME}.json", facts | {"rows": [as_json(row) for row in rows]})
    with atomic_file(output / f"{NAME}.md") as stream:
        stream.write(page(facts, markdown(rows)))


def run_tests(log: Path) -> dict[str, Any]:
    """The tests of ``tests/gpu``; their last lines say what was skipped, and why. All they print goes to ``log``."""
    options = ["-v", "-rsf", "--no-header", "-o", f"timeout={ONE_TEST_SECONDS}"]
    command = [sys.executable, "-m", "pytest", "tests/gpu", *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as stream:
        status = run_group(command, stream, TEST_SECONDS)
        if status is None:
            stream.write(f"\nended after {TEST_SECONDS} s\n")
    return {"status": status, "output": log.read_text(encoding="utf-8", errors="replace")[-6000:]}


def run_group(command: list[str], stream: TextIO, timeout_seconds: float) -> int | None:
    """Run a command with all that it starts; None when it was ended at the limit: nothing of it may run on beside what
    is measured afterwards."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True)
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


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
        *([facts["note"], ""] if facts["note"] else []),
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
