"""All words of the prompts, per domain (the method's parts and intent, arXiv 2403.13325, in our own words), and how
prompts are put together: one function for the recommender, one for the summarizer. Our words and the texts of data and
models are kept apart, so that the tokenizer never takes a text for a control token."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

WORDING_VERSION = 3
"""Raised whenever a text below or the way texts are cut changes; it is part of every prompt hash."""
PREFERENCES, RECENT, CANDIDATE = "[Preference Summary]", "[Recent Items]", "[Candidate]"
SUMMARIES, ITEMS = "[Summaries]", "[Items]"
ANSWER_CUE = "Answer:"
SUMMARY_CUE = "Summary:"
NO_SUMMARY = "(none)"

_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
"""Control characters that ``str.split`` does not take for white space."""
_SECTIONS = "|".join(map(re.escape, (PREFERENCES, RECENT, CANDIDATE, SUMMARIES, ITEMS)))
_MARKS = re.compile(rf"{_SECTIONS}|^(?:{ANSWER_CUE}|{SUMMARY_CUE})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Wording:
    """The domain's nouns, as they stand in the sentences below."""

    items: str
    """Plural: "news articles"."""
    item: str
    chose: str
    """What the user did with them: "read"."""
    choose: str


WORDINGS = {
    "news": Wording("news articles", "news article", "read", "read"),
    "products": Wording("products", "product", "bought", "buy"),
    "items": Wording("items", "item", "chose", "choose"),
}


def recommend_instruction(domain: str) -> str:
    """What the recommender is asked to do."""
    w = WORDINGS[domain]
    return (
        f"Below are a summary of a user's preferences, the {w.items} the user {w.chose} most recently, and one "
        f"candidate {w.item}. Decide whether the user will {w.choose} the candidate next. Answer yes or no."
    )


def block_instruction(domain: str) -> str:
    """First level of the hierarchical scheme, first step of the recurrent one."""
    w = WORDINGS[domain]
    return (
        f"Below are {w.items} that a user {w.chose}, oldest first. Summarize in a few sentences which topics, "
        "brands, names and kinds of content this user prefers. Write only the summary."
    )


def merge_instruction(domain: str) -> str:
    """Upper levels of the hierarchical scheme."""
    w = WORDINGS[domain]
    return (
        f"Below are summaries of a user's preferences over consecutive periods of {w.items}, oldest first. Merge them "
        "into one summary of a few sentences; what is recent or recurs matters most. Write only the summary."
    )


def update_instruction(domain: str) -> str:
    """Later steps of the recurrent scheme."""
    w = WORDINGS[domain]
    return (
        f"Below are a summary of a user's preferences so far and the {w.items} the user {w.chose} since, oldest "
        "first. Write the updated summary in a few sentences: keep what still holds, add what is new. Write only the "
        "summary."
    )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, its texts kept apart from the words between them."""

    words: tuple[str, ...]
    """Ours: instruction, section marks, line ends, cue; one more than texts."""
    texts: tuple[str, ...]
    """Of data and models, which must not be taken for anything else."""

    def __str__(self) -> str:
        return "".join(chain.from_iterable(zip_longest(self.words, self.texts, fillvalue="")))


def one_line(text: str) -> str:
    """White space, line ends and control characters become single blanks."""
    return " ".join(_CONTROLS.sub(" ", text).split())


def as_value(text: str) -> str:
    """A text as it may stand in a prompt: in one line, with a blank in whatever reads like a section mark of ours, and
    in a cue that it begins with (``[Candidate ]``, ``Answer :``)."""
    return _MARKS.sub(lambda mark: broken(mark[0]), one_line(text))


def broken(mark: str) -> str:
    """A blank before the last character: readable, and no longer the same mark."""
    return f"{mark[:-1]} {mark[-1]}"


def recommend_prompt(instruction: str, summary: str, recent: Sequence[str], candidate: str) -> Prompt:
    """Instruction, preference summary, recent items, candidate, answer cue, in the order of the paper.

    Everything that a user's candidates share comes first, so that it is one prefix of all their prompts.

    Args:
        instruction: ours.
        summary: as ``as_value`` gives it, like the other texts.
        recent: oldest first.
        candidate: one item.
    """
    opening = f"{instruction}\n\n{PREFERENCES}\n"
    items = (f"\n\n{RECENT}\n- ",) + ("\n- ",) * (len(recent) - 1) if recent else ()
    closing = (f"\n\n{CANDIDATE}\n", f"\n\n{ANSWER_CUE}")
    if not recent:
        closing = (f"\n\n{RECENT}\n{NO_SUMMARY}{closing[0]}", closing[1])
    return Prompt((opening, *items, *closing), (summary or NO_SUMMARY, *recent, candidate or NO_SUMMARY))


def recommend_text(instruction: str, summary: str, recent: Sequence[str], candidate: str) -> str:
    """The same as text, for any texts."""
    return str(
        recommend_prompt(instruction, as_value(summary), [as_value(text) for text in recent], as_value(candidate))
    )


@dataclass(frozen=True, slots=True)
class SummaryPrompt:
    """One request to the summarizer, kept in parts so that trimming and the extractive engine can see them."""

    instruction: str
    previous: tuple[str, ...] = ()
    """Summaries that this one is made from: of consecutive blocks (hierarchical) or the last state (recurrent)."""
    items: tuple[str, ...] = ()
    """Texts of the block's items, oldest first."""

    def prompt(self, value: Callable[[str], str] = as_value) -> Prompt:
        """The prompt with its texts kept apart, each as ``value`` has it."""
        words = [self.instruction]
        for mark, texts in ((SUMMARIES, self.previous), (ITEMS, self.items)):
            if texts:
                words[-1] += f"\n\n{mark}\n- "
                words += ["\n- "] * (len(texts) - 1) + [""]
        words[-1] += f"\n\n{SUMMARY_CUE}"
        return Prompt(tuple(words), tuple(map(value, (*self.previous, *self.items))))

    def text(self) -> str:
        """The prompt as a model reads it whose tokenizer takes none of the texts for a control token."""
        return str(self.prompt())
