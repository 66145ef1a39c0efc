"""How a history becomes one summary, one scheme a module: its name is the setting, its ``plan`` the graph of prompts.

A module put beside these is a new scheme; nothing else has to know of it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module

from trsr_dist.errors import ConfigError
from trsr_dist.summarize.plans.graph import Plan

Planner = Callable[[int, int, int], Plan]
"""From the number of items, the block size and the fan-in to a plan."""


def schemes() -> list[str]:
    """Names of the schemes there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "graph")


def planner(scheme: str) -> Planner:
    """The ``plan`` function of a scheme.

    Raises:
        ConfigError: there is no such scheme.
    """
    if scheme not in schemes():
        raise ConfigError(f"summarize.scheme={scheme!r}: no such scheme; there are {', '.join(schemes())}")
    return import_module(f"{__name__}.{scheme}").plan
