"""The libraries' environment, as the entry points set it, before any test imports torch."""

import logging
from collections.abc import Iterator

import pytest

from trsr_dist.environment import prepare_process

prepare_process(num_threads=1)

from torch.nn import functional  # noqa: E402

LINEAR = functional.linear


@pytest.fixture(autouse=True)
def restore_linear() -> Iterator[None]:
    """DeepSpeed's ``zero.Init`` replaces the function for the whole process, and leaves it so."""
    yield
    functional.linear = LINEAR


@pytest.fixture(autouse=True)
def hear_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """``setup_logging`` keeps lines from ``caplog``: what an earlier test has set up must not matter."""
    monkeypatch.setattr(logging.getLogger("trsr"), "propagate", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders with long tests first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: item.path.parent.name not in {"train", "evaluate", "merge"})
