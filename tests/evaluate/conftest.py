"""The run that the tests of whole evaluations share; they write elsewhere."""

from pathlib import Path

import pytest

from tests.evaluate.world import make_run, run_command


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def alone(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of an evaluation by one process."""
    output = tmp_path_factory.mktemp("alone")
    code, text = run_command(run, output)
    assert code == 0, text
    return output
