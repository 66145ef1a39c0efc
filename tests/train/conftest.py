"""The run whose base and shards the trainings of a module share."""

from pathlib import Path

import pytest

from tests.train.world import make_run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("source"))
