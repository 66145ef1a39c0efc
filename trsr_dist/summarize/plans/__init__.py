"""How a history becomes one summary, one scheme a module: its name is the setting, its ``plan`` the graph of prompts.

A module put beside these is a new scheme; nothing else has to know of it. One without prompts may have a ``text``,
which writes what stands in place of the summary.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType

from trsr_dist.errors import ConfigError
from trsr_dist.summarize.plans.graph import Plan

Planner = Callable[[int, int, int], Plan]
"""From the number of items, the block size and the fan-in to a plan."""
Writer = Callable[[Sequence[str], int, int], str]
"""From the texts of a history (oldest first), the number of recent items and the most words to a text."""


def schemes() -> list[str]:
    """Names of the schemes there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "graph")


def planner(scheme: str) -> Planner:
    """The ``plan`` function of a scheme.

    Raises:
        ConfigError: there is no such scheme.
    """
    return _module(scheme).plan


def writer(scheme: str) -> Writer:
    """The ``text`` function of a scheme; of one that has none, a function that writes nothing.

    Raises:
        ConfigError: there is no such scheme.
    """
    return getattr(_module(scheme), "text", lambda items, num_recent, max_words: "")


def _module(scheme: str) -> ModuleType:
    if scheme not in schemes():
        raise ConfigError(f"summarize.scheme={scheme!r}: no such scheme; there are {', '.join(schemes())}")
    return import_module(f"{__name__}.{scheme}")
