"""What becomes of a changed setting when a training goes on from a checkpoint; declared beside each setting."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel


class OnResume(Enum):
    """Marks a setting that losses depend on. A setting without a mark may change at any time."""

    REFUSED = "refused"
    """It gives the checkpoint's weights their meaning or their start."""
    SAID = "said"
    """The training goes on under the new value, and says so."""


def marked_settings(section: BaseModel) -> dict[str, OnResume]:
    """The marked settings of a section, by name."""
    fields = type(section).model_fields.items()
    return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, OnResume)}
