"""The lab as a fixture. With TRSR_REQUIRE_SLURM=1 a machine that cannot run it fails instead of skipping."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
