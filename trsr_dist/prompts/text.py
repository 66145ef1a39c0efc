"""From parts to prompt text: one function for the recommender, one for the summarizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ANSWER_CUE = "Answer:"
SUMMARY_CUE = "Summary:"
NO_SUMMARY = "(none)"


def recommend_text(instruction: str, summary: str, recent: Sequence[str], candidate: str) -> str:
    """Instruction, preference summary, recent items, candidate, answer cue, in the order of the paper.

    Everything that a user's candidates share comes first, so that it is one prefix of all their prompts.
    """
    return "\n\n".join(
        (
            instruction,
            f"[Preference Summary]\n{summary or NO_SUMMARY}",
            "[Recent Items]\n" + ("\n".join(f"- {text}" for text in recent) or NO_SUMMARY),
            f"[Candidate]\n{candidate}",
            ANSWER_CUE,
        )
    )


@dataclass(frozen=True, slots=True)
class SummaryPrompt:
    """One request to the summarizer, kept in parts so that trimming and the extractive engine can see them."""

    instruction: str
    previous: tuple[str, ...] = ()
    """Summaries that this one is made from: of consecutive blocks (hierarchical) or the last state (recurrent)."""
    items: tuple[str, ...] = ()
    """Texts of the block's items, oldest first."""

    def text(self) -> str:
        """The prompt as the model reads it."""
        parts = [self.instruction]
        if self.previous:
            parts.append("[Summaries]\n" + "\n".join(f"- {text}" for text in self.previous))
        if self.items:
            parts.append("[Items]\n" + "\n".join(f"- {text}" for text in self.items))
        return "\n\n".join((*parts, SUMMARY_CUE))
