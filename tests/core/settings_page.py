"""docs/settings.md, made from the settings themselves: ``python -m tests.core.settings_page`` writes it again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trsr_dist.config import Config
from trsr_dist.config.kinds import OnResume

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """# Settings

Every setting of a run, with its default. A config file holds those that differ (`configs/`), the command line overrides
both: `python launch/train.py --config configs/mind.yaml train.learning_rate=2e-4 'evaluate.top_k=[5,10]'`. Unknown
keys, wrong types and settings that contradict each other are refused before anything is read. `python tools/setting.py
--config FILE` prints the merged config, and every stage keeps the one it ran with in `RUN/config/`.

**fixed**: a training that resumes from a checkpoint refuses another value; so it does with other shards (`data`,
`summarize`), another `prompt` and another base. **noted**: it resumes with the new value and logs a warning. The other
settings of a training may change at any restart. A finished stage is not redone for other settings: it reports the
difference and wants `--force`. This page is written by `python -m tests.core.settings_page`.
"""
TITLES = {
    "run": "the run's folder and seed",
    "demo": "the built-in data",
    "data": "raw logs to histories, users and candidates",
    "summarize": "histories to summaries",
    "prompt": "what the recommender reads",
    "model": "its base",
    "lora": "its adapter",
    "train": "its training",
    "evaluate": "scores and metrics",
    "base": "the small model made here",
}
SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<"), MinLen: ("min_length", "at least")}
EXPECTED = {"≥ 0", "≥ 1", "at least 1 values"}
ON_RESUME = {OnResume.REFUSED: "fixed", OnResume.SAID: "noted"}
HELD_BY_STREAM = {"run.seed"} | {
    f"train.{key}" for key in ("negatives_per_positive", "pool", "row_tokens", "rows_per_step")
}
"""Fixed too: ``trsr_dist.shards.steps.StreamState`` compares what the rows depend on."""


def page() -> str:
    """The whole page, Markdown."""
    sections = (section_text(name, field.annotation) for name, field in Config.model_fields.items())
    return "\n".join([HEAD, *sections])


def section_text(name: str, section: type[BaseModel]) -> str:
    rows = [row(f"{name}.{key}", field) for key, field in section.model_fields.items()]
    return "\n".join(
        [f"## `{name}`: {TITLES[name]}", "", "| setting | default | values | meaning |", "|---|---|---|---|", *rows, ""]
    )


def row(key: str, field: FieldInfo) -> str:
    marks = [f"**{ON_RESUME[mark]}**." for mark in field.metadata if isinstance(mark, OnResume)]
    marks += ["**fixed**."] if key in HELD_BY_STREAM else []
    limits = [limit(mark) for mark in field.metadata if type(mark) in SIGNS and limit(mark) not in EXPECTED]
    values = ", ".join([*(f"`{choice}`" for choice in choices(field.annotation)), *limits])
    return f"| `{key}` | {default(field.default)} | {values} | {cell(' '.join([*field.description.split(), *marks]))} |"


def choices(annotation: Any) -> tuple[str, ...]:
    """The values that a setting, or each element of it, may have; none where they are not enumerated."""
    if get_origin(annotation) is tuple:
        return choices(get_args(annotation)[0])
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def limit(mark: Any) -> str:
    attribute, sign = SIGNS[type(mark)]
    return f"{sign} {getattr(mark, attribute)}" + (" values" if isinstance(mark, MinLen) else "")


def default(value: Any) -> str:
    assert value is not PydanticUndefined, "every setting has a default"
    return "empty" if value in ("", ()) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
