"""These tests need a GPU; `make gpu-check` runs them, elsewhere they are skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FlexAttention last: it is compiled for long, and the run may be cut off."""
    items.sort(key=lambda item: "tests/gpu/" in item.path.as_posix() and "flex" in item.name)
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU (make gpu-check)"))
