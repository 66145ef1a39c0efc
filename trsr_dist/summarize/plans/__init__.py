"""The schemes by which a history becomes one summary: those of ``graph``, and one in each file put beside it.

The file's name is the setting, its ``plan`` the graph of prompts; one without prompts may have a ``text``, which writes
what stands in place of the summary. Nothing else has to know of it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from trsr_dist.errors import ConfigError
from trsr_dist.summarize.plans.graph import BUILT_IN, Planner, Scheme, Writer, no_text


def schemes() -> list[str]:
    """Names of the schemes there are."""
    return sorted({*BUILT_IN, *_files()})


def planner(scheme: str) -> Planner:
    """The ``plan`` function of a scheme.

    Raises:
        ConfigError: there is no such scheme.
    """
    return _find(scheme).plan


def writer(scheme: str) -> Writer:
    """The ``text`` function of a scheme; of one that has none, a function that writes nothing.

    Raises:
        ConfigError: there is no such scheme.
    """
    return _find(scheme).text


def _files() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(__path__)} - {"graph"}


def _find(name: str) -> Scheme:
    if name in _files():  # it counts, also where it has the name of one of ours
        module = import_module(f"{__name__}.{name}")
        return Scheme(module.plan, getattr(module, "text", no_text))
    if name not in BUILT_IN:
        raise ConfigError(f"summarize.scheme={name!r}: no such scheme; there are {', '.join(schemes())}")
    return BUILT_IN[name]
