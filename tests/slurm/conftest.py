"""The lab as a fixture. With TRSR_REQUIRE_SLURM=1 a machine that cannot run it fails instead of skipping."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from tests.slurm.lab import Lab, what_is_missing


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Three nodes of 2 CPUs and 2 fake GPUs each."""
    missing = what_is_missing()
    if missing and os.environ.get("TRSR_REQUIRE_SLURM") == "1":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    with Lab(nodes=3, cpus=2, gpus=2) as started:
        yield started


@pytest.fixture
def report(record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Print how long something took; the tables of the documents come from here."""

    def write(what: str, seconds: float) -> None:
        record_property(what, round(seconds, 1))
        with capsys.disabled():
            print(f"\n  {what}: {seconds:.1f} s")

    return write
