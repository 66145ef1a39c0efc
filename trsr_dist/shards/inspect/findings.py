"""What was found wrong, in words."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Findings:
    """Errors (damage, leaks, users in two splits) and warnings."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, is_error: bool, text: str) -> None:
        (self.errors if is_error else self.warnings).append(text)

    def error(self, text: str) -> None:
        self.errors.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def lines(self) -> list[str]:
        """One line for each, errors first."""
        lines = [*(f"error: {text}" for text in self.errors), *(f"warning: {text}" for text in self.warnings)]
        return lines or ["nothing wrong was found"]
