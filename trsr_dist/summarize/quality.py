"""What is wrong with a generated summary. Pure."""

from __future__ import annotations

import re
from collections import Counter

from trsr_dist.prompts.text import SUMMARY_CUE, SummaryPrompt
from trsr_dist.words import has_text, split_words, word_spans

TURN_MARKERS = ("[Summaries]", "[Items]", SUMMARY_CUE, "[Candidate]", "\nUser:", "\nHuman:", "\nAssistant:", "<|")
"""Text after one of these belongs to a turn that the model made up."""
STOPS = tuple(f"\n{marker}" if marker == SUMMARY_CUE else marker for marker in TURN_MARKERS)
"""Where servers end a text: at the cue only where it begins a line, for elsewhere it may be a title."""
TITLE = re.compile(r"^[\W_]*(?:[\w'-]+ ){0,5}(?:Summary:[\W_]*)+", re.MULTILINE)
"""A heading that chat models like to begin with, such as ``**Updated Summary:**``."""
HEADING = re.compile(r"#.*|\*\*.*\*\*")
PREAMBLE_WORDS = 12
"""A line of at most as many words before the title announces the summary."""
THOUGHTS = ("<think>", "</think>")
"""What reasoning models write before their answer stands between these."""
ECHO_WORDS = 8
"""Words in a row taken from the instruction that count as its echo."""
REPEAT_WORDS = 3
REPEAT_SHARE = 0.5
"""A text whose most common or repeated word triples make up this share of it is a repetition."""
REPEAT_MIN_WORDS = 12
"""Shorter texts are never called repetitive."""


def turn_place(text: str) -> int | None:
    """Where a turn that the model made up begins; None where there is none. A title that opens the text is none."""
    title = TITLE.search(text)
    first = title.end() if title and is_announced(text[: title.start()].strip()) else 1
    return min((place for place in (text.find(marker, first) for marker in TURN_MARKERS) if place > 0), default=None)


def answer(text: str) -> str:
    """The text without thoughts, title and what announces it; thoughts that never end leave nothing."""
    begin, end = THOUGHTS
    _, ended, rest = text.rpartition(end)
    if not ended and text.lstrip().startswith(begin):
        return ""
    title = TITLE.search(rest)
    return rest[title.end() :] if title and is_preamble(rest[: title.start()].strip()) else rest


def is_preamble(text: str) -> bool:
    """Whether nothing, or a mere announcement, stands before the title: ``is_announced``, or one short line."""
    is_short = "\n" not in text and len(split_words(text)) <= PREAMBLE_WORDS
    return is_announced(text) or (is_short and turn_place(text) is None)


def is_announced(text: str) -> bool:
    """Whether nothing, a heading, or what ends in a colon stands before the title."""
    opens = not text or text.rstrip("*_ ").endswith(":") or HEADING.fullmatch(text) is not None
    return opens and turn_place(text) is None


def clean(text: str) -> tuple[str, bool]:
    """The answer in one line without what follows a turn marker, and whether there was one (a run-on)."""
    text = answer(text)
    place = turn_place(text)
    return " ".join(text[:place].split()), place is not None


def flags_of(text: str, prompt: SummaryPrompt, run_on: bool, cut: bool) -> tuple[str, ...]:
    """Names of the faults: empty, echo, run_on, repetition, cut.

    Args:
        text: cleaned text.
        prompt: what it answers.
        run_on: a turn marker was found and cut away.
        cut: the token limit ended it.
    """
    sources = " ".join((*prompt.previous, *prompt.items))
    # Of items that have no letters or digits themselves, any sign will do.
    has_content = _has_letters(text) or (has_text(text) and has_text(sources) and not _has_letters(sources))
    faults = {
        "empty": not has_content,
        "echo": is_echo(text, prompt.instruction),
        "run_on": run_on,
        "repetition": is_repetitive(text),
        "cut": cut,
    }
    return tuple(name for name, found in faults.items() if found)


def _has_letters(text: str) -> bool:
    return any(character.isalnum() for character in text)


def is_echo(text: str, instruction: str) -> bool:
    """Whether the text holds a run of words of the instruction."""
    lowered, instruction = (" ".join(part.lower().split()) for part in (text, instruction))
    spans = word_spans(instruction)
    runs = (instruction[first:last] for (first, _), (_, last) in zip(spans, spans[ECHO_WORDS - 1 :], strict=False))
    return any(run in lowered for run in runs)


def is_repetitive(text: str) -> bool:
    """Whether repeated word triples make up most of the text."""
    words = split_words(text.lower())
    if len(words) < REPEAT_MIN_WORDS:
        return False
    triples = Counter(tuple(words[i : i + REPEAT_WORDS]) for i in range(len(words) - REPEAT_WORDS + 1))
    repeated = sum(number - 1 for number in triples.values())
    return repeated >= REPEAT_SHARE * sum(triples.values())
