"""A whole run to predict with, as the evaluation's tests make it."""

from tests.evaluate.conftest import alone, run  # noqa: F401
