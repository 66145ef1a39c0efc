"""Summaries without a model: what a user's items have in common, by frequency. Pure and deterministic.

A summary reads ``sports/tennis (4), finance/markets (2); words: final (2), rain``. It can be read back, so that merges
and updates add the counts up. A count of 1 is not written. The engine needs nothing but the standard library.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.requests import Completion, Request
from trsr_dist.words import (
    HAN,
    HANGUL,
    HIRAGANA,
    KATAKANA,
    MARKS,
    SOUTHEAST_ASIAN,
    UNSPACED,
    cut_words,
    split_words,
)

EXTRACT_VERSION = 5
"""Raised whenever the texts change; part of their keys."""
SHORT_WORDS = 3
"""A field's value of up to this many words is a topic, a longer one is free text."""
UNSPACED_WORDS = 2
"""Words of two characters that say as much as one between blanks (Chinese, Japanese, Thai, ...)."""
MAX_ITEMS = 65_536
"""Items whose terms are remembered, about 60 MB of news."""
MIN_LETTERS = 4
MIN_DENSE_LETTERS = 2
"""Of Han, Katakana and Korean words, whose letters are syllables."""
TOPIC_SHARE = 0.75
"""Share of the words that topics may take while there are free-text words to show."""
WORDS_MARK = "words:"
_FIELD = re.compile(rf"(?:^|; )([\w{MARKS} ()/.&%#+-]{{1,30}}): ")
_WORDS = re.compile(f"(?:^|; ){WORDS_MARK} ")
_TERM = re.compile(r"(?P<term>.+?)(?: \((?P<count>\d+)\))?\Z", re.DOTALL)
_WORD = re.compile(rf"[^\W\d_][\w{MARKS}'-]+")
_PART = re.compile(
    rf"(?P<han>[{HAN}]+)|[{KATAKANA}]+|[{HIRAGANA}]+|(?P<southeast_asian>[{SOUTHEAST_ASIAN}]+)|[^{UNSPACED}]+"
)
"""Parts of a run of letters: where the script changes, a word of Japanese mostly begins."""
_GRAMS = {"han": 2, "southeast_asian": 4}
"""Characters of the n-grams that stand for words where more than two words run together."""
_DENSE = re.compile(rf"[{HAN}{KATAKANA}{HANGUL}]")
_UNSPACED = re.compile(rf"[{UNSPACED}]")
_LISTED = re.compile("[,\u3001\uff0c]")
_FUNCTION_WORDS = """
about after again against also another because been before being between both cannot could does
doing down during each every first from further have having here into just last made make many might
more most much must near never next only other over said same should since some still such take than
that their them then there these they this those through under until upon very want were what when
where which while whom will with within without would year years your yours
"""
STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


@dataclass(slots=True)
class Terms:
    """Counts of topics and words; the position of the latest sight breaks ties in favour of what is recent."""

    topics: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    seen: dict[str, int] = field(default_factory=dict)
    num_seen: int = 0

    def add(self, counter: Counter[str], term: str, count: int = 1) -> None:
        counter[term] += count
        self.num_seen += 1
        self.seen[term] = self.num_seen

    def ranked(self, counter: Counter[str]) -> list[str]:
        """Most frequent first, then the most recent; no two terms were seen at the same time."""
        return sorted(counter, key=lambda term: (counter[term], self.seen[term]), reverse=True)


def extract(prompt: SummaryPrompt, max_words: int) -> str:
    """The summary of a prompt's parts, in at most ``max_words`` words (or one term, where that is longer)."""
    terms = Terms()
    for summary in prompt.previous:  # of our own; in any other, all is one list of topics
        for counter, part in zip((terms.topics, terms.words), _WORDS.split(summary, maxsplit=1), strict=False):
            for term in reversed([term for term in part.strip(" ;").split(", ") if term]):
                match = _TERM.match(term)
                terms.add(counter, match["term"], int(match["count"] or 1))
    for item in prompt.items:
        topics, words = item_terms(item)
        for topic in topics:
            terms.add(terms.topics, topic)
        for word in words:
            terms.add(terms.words, word)
    return write_summary(terms, max_words) or plain_text(prompt, max_words)


def plain_text(prompt: SummaryPrompt, max_words: int) -> str:
    """The texts themselves, where nothing in them tells."""
    text = cut_words(" ".join(" ".join((*prompt.previous, *prompt.items)).split()), max_words)
    parts = (text.strip(" ;") or text).split(", ")
    return ", ".join(_counted(part, dict.fromkeys(parts, 1)) if part else part for part in parts)


@lru_cache(MAX_ITEMS)
def item_terms(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Topics and words of an item: leading short fields make one topic (sports/tennis), later short ones a topic each,
    the rest gives words. Remembered, as items come back from user to user."""
    leading, topics, free = split_fields(text)
    return ("/".join(leading),) * bool(leading) + tuple(topics), tuple(dict.fromkeys(informative_words(free)))


def split_fields(text: str) -> tuple[list[str], list[str], str]:
    """Values of the leading short fields, of later short ones that hold letters, and the free text."""
    marks = list(_FIELD.finditer(text))
    if not marks or marks[0].start() != 0:
        return [], [], text
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    values = [text[mark.end() : end].strip(" ;,") for mark, end in zip(marks, ends, strict=True)]
    leading: list[str] = []
    for value in values:
        if not _is_short(value):
            break
        leading.append(value)
    rest = values[len(leading) :]
    return leading, [value for value in rest if _is_short(value)], " ".join(v for v in rest if not _is_short(v))


def _is_short(value: str) -> bool:
    limit = SHORT_WORDS * (UNSPACED_WORDS if _UNSPACED.search(value) else 1)
    return len(split_words(value)) <= limit and _WORD.search(value) is not None and not _LISTED.search(value)


def informative_words(text: str) -> list[str]:
    """Words of some length that are no function words, in lower case; parts and n-grams in scripts without blanks."""
    words = [word.lower() for word in _WORD.findall(text)]
    if not text.isascii():
        words = [part for word in words for part in _parts(word)]
    return [
        word
        for word in words
        if len(word) >= (MIN_LETTERS if word.isascii() or not _DENSE.match(word) else MIN_DENSE_LETTERS)
        and word not in STOP_WORDS
    ]


def _parts(word: str) -> Iterator[str]:
    """Parts of a run of letters by script; n-grams of those without blanks that are too long to be words."""
    for match in _PART.finditer(word):
        part, size = match[0], _GRAMS.get(match.lastgroup or "", 0)
        if not size or len(part) <= 2 * size:
            yield part
        else:
            grams = (part[i : i + size] for i in range(len(part) - size + 1))
            yield from (gram for gram in grams if gram[0] not in MARKS)


def write_summary(terms: Terms, max_words: int) -> str:
    """Topics first; words fill what is left."""
    topics, words = terms.ranked(terms.topics), terms.ranked(terms.words)
    room = int(max_words * TOPIC_SHARE) if words else max_words
    shown = _within(topics, terms.topics, room) or [_counted(topic, terms.topics) for topic in topics[:1]]
    room = max_words - sum(len(split_words(term)) for term in shown) - 1
    others = _within(words, terms.words, room)
    if not shown and not others:
        others = [_counted(word, terms.words) for word in words[:1]]
    parts = [", ".join(shown)] * bool(shown) + [f"{WORDS_MARK} {', '.join(others)}"] * bool(others)
    return "; ".join(parts)


def _within(terms: Iterable[str], counts: Mapping[str, int], max_words: int) -> list[str]:
    kept, room = [], max_words
    for term in terms:
        shown = _counted(term, counts)
        room -= len(split_words(shown))
        if room < 0:
            break
        kept.append(shown)
    return kept


def _counted(term: str, counts: Mapping[str, int]) -> str:
    """A term that ends as a count does (Heat (1995)) shows its count even if that is 1: it is read back."""
    is_shown = counts[term] > 1 or _TERM.match(term)["count"]
    return f"{term} ({counts[term]})" if is_shown else term


class ExtractiveEngine:
    """Lists what a user's items have in common.

    Args:
        capacity: requests between two polls.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._done: list[Completion] = []

    def submit(self, request: Request) -> None:
        text = extract(request.prompt, request.max_new_tokens)
        self._done.append(Completion(request.key, text, new_tokens=len(split_words(text)), generated=False))

    def poll(self) -> list[Completion]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self._done.clear()
