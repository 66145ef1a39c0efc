"""Types of settings, what their values may be, and what a change of one means for a training that goes on."""

from __future__ import annotations

import re
from enum import Enum
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Field, JsonValue

from trsr_dist.environment import expand_home

T = TypeVar("T")
Beta = Annotated[float, Field(ge=0, lt=1)]
FilePath = Annotated[str, AfterValidator(expand_home)]
WITH_SECRET = re.compile(r"\w+://([^/]*@|.*\?)")


def _without_secret(place: str) -> str:
    if WITH_SECRET.match(place):
        raise ValueError(
            "no user, password or query may stand in an address; keys come from where the store's client looks for "
            "them (AWS_PROFILE, HF_TOKEN and the like)"
        )
    return place


StorePath = Annotated[FilePath, AfterValidator(_without_secret)]
"""A path, or an address in a store that fsspec knows."""
Modules = Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"]
RESERVED = {
    "self", "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
"""Arguments of a tokenizer's ``apply_chat_template``, which are no variables of a template."""


def _are_variables(values: dict[str, JsonValue]) -> dict[str, JsonValue]:
    for name in values:
        if name in RESERVED:
            raise ValueError(f"{name!r} is an argument of the tokenizer and no variable of its template; leave it out")
    return values


def _are_distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} stands there twice; name it once")
    return values


DISTINCT = AfterValidator(_are_distinct)
"""Of lists whose entries are done or shown one by one."""
TemplateVariables = Annotated[dict[str, JsonValue], AfterValidator(_are_variables)]
Role = Literal["user", "item", "time", "history", "target", "shown", "id", "category", "candidates"]
NO_THOUGHTS: TemplateVariables = {"enable_thinking": False}
"""Variables of chat templates, for the recommender and the summarizer alike."""


class OnResume(Enum):
    """Marks a setting that losses or the choice of the best depend on. One without a mark may change at any time."""

    REFUSED = "refused"
    """It gives the checkpoint's weights their meaning or their start."""
    SAID = "said"
    """The training goes on under the new value, and says so."""


def marked_settings(section: BaseModel) -> dict[str, OnResume]:
    """The marked settings of a section, by name."""
    fields = type(section).model_fields.items()
    return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, OnResume)}
