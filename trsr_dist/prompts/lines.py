"""Token ids of a user's prompts, put together from those of lines and words. Pure; tokenizers are arguments.

All prompts of a user begin alike, items come back from user to user and words from text to text, so nearly all of a
prompt has been tokenized before. Prompts are cut behind the line ends of our own words, and before single blanks: no
text has a line end, begins or ends with a blank. Where a tokenizer never joins what stands on the two sides of such a
cut, the ids of a prompt are those of its pieces. When a tokenizer is first used, that is checked with texts that
tokenizers are known to join; a text that holds a token of the vocabulary which spans a cut is always seen whole. If the
check fails, all prompts are tokenized whole.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Generic, TypeVar

from trsr_dist.log import get_logger
from trsr_dist.prompts.encoder import HARMLESS, Encoder
from trsr_dist.prompts.text import NO_SUMMARY, Prompt, recommend_prompt

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")
Line = tuple[str, str, str]
"""Our words before a text, the text, our words behind it."""
Ids = tuple[int, ...]

ANCHOR = "x"
"""Stands before a piece that is tokenized alone, so that it does not count as the beginning of a text."""
MAX_CHARACTERS = 16_000_000
"""What is remembered at most, the ``ENTRY`` of each text included: about 70,000 titles of news, some 60 MB with ids."""
ENTRY = 100
MAX_SPANNING = 64
BLANK = re.compile("(?= )")
MAY_SPAN = re.compile("[\n\u010a].|.[ \u0120\u2581]", re.DOTALL)
"""Of vocabularies: a line end or blank within a token, as byte-level vocabularies and SentencePiece write them."""
SPANS = re.compile(r"\n\S|\S ")
"""Of texts: where they are cut."""
SIGNS = (
    ".:;'\"!?()[]<>|/\\#-1\u0301\u00b4\u00a8\ufb01\u0e33\ufe0f\u1161\u0345\uff1a\u200b\u200d\ufeff\u0120\u010a\u0130"
    "\u5546\u3002\u0627\ufdfa\u0937\ud55c\U0001fae0"
)
"""Punctuation that joins line ends, combining marks, what normalizers turn into blanks, signs of tokenizers."""
HOSTILE_TEXTS = (HARMLESS, "a b", "- a", "12:", "'s", "...", "|>", "\\n", *(f"{sign}a{sign}" for sign in SIGNS))

log = get_logger("prompts")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a user's prompts."""

    prefix: Ids
    """What all of them begin with, though not always all that they have in common."""
    rests: tuple[Ids, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [len(self.prefix) + len(rest) for rest in self.rests]


class Memory(dict[Key, Value], Generic[Key, Value]):
    """What was found out about texts."""

    num_characters = 0

    def keep(self, key: Key, value: Value, num_characters: int) -> None:
        self.num_characters += num_characters + ENTRY
        self[key] = value

    def empty_if_full(self) -> None:
        """Between users: what is being looked up stays."""
        if self.num_characters > MAX_CHARACTERS:
            self.clear()
            self.num_characters = 0


class LineEncoder:
    """Tokenizes the prompts of a user's candidates.

    Args:
        encoder: of whole prompts.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        before_blank, before_line = encoder.part_ids([ANCHOR, f"{ANCHOR}\n"])
        self._anchors = {" ": before_blank, "\n": before_line}
        self._lines: Memory[str | Line, Ids | None] = Memory()
        self._pieces: Memory[str, Ids | None] = Memory()
        self._control: dict[tuple[str, str], list[int]] = {}
        self._numbers: dict[int, int] = {}
        """One object for each token id, however often it is remembered."""

    def encode(self, prompt: Prompt, candidates: Sequence[str]) -> Encoded:
        """Token ids of the prompts for all candidates: those of ``Encoder.encode``.

        Args:
            prompt: for any of them.
            candidates: at least one.

        Raises:
            DataError: a text makes a control token and cannot be taken apart.
        """
        if not self.is_exact:
            return self._whole(prompt, candidates)
        self._lines.empty_if_full()
        self._pieces.empty_if_full()
        *shared, (before, _, after) = self._split(prompt)
        found = self._line_ids([*shared, *((before, text or NO_SUMMARY, after) for text in candidates)])
        beginning, rests = found[: len(shared)], found[len(shared) :]
        if None in beginning:
            return self._whole(prompt, candidates)
        prefix = sum(beginning, self._opening(prompt))
        if None not in rests:
            return Encoded(prefix, tuple(rests))
        odd = [text for text, rest in zip(candidates, rests, strict=True) if rest is None]
        whole = iter(self._whole(prompt, odd).rests)
        return Encoded((), tuple(next(whole) if rest is None else prefix + rest for rest in rests))

    def count(self, text: str) -> int:
        """Tokens of a text alone: ``Encoder.count``."""
        ids = self._text_ids([text])[0] if self.is_exact else None
        return len(ids) if ids and not self._encoder.control_of(ids) else self._encoder.count(text)

    @cached_property
    def is_exact(self) -> bool:
        """Whether prompts and their pieces have the same ids, for texts that tokenizers are known to join."""
        if self._spanning is None:
            return self._refused(f"more than {MAX_SPANNING} tokens with a blank or line end within")
        texts = [text for text in HOSTILE_TEXTS if None not in self._text_ids([text, f"a {text}", f"\n{text}"])]
        size = len(texts)
        around = texts * 3
        prompts = [recommend_prompt(HARMLESS, HARMLESS, (HARMLESS, HARMLESS), HARMLESS)]
        for place, text in enumerate(texts):
            # Over all places every text stands before every other one.
            pairs = " ".join(f"{around[n]} {around[n + place]}" for n in range(size))
            recent = around[place + 1 : place + 1 + place % 4]
            prompts.append(recommend_prompt(HARMLESS, pairs, recent, around[place + 5]))
            prompts.append(recommend_prompt(HARMLESS, text, recent[::-1], text))
        for prompt, whole in zip(prompts, self._encoder.encode(prompts), strict=True):
            parts = [*self._line_ids(self._split(prompt)), *self._text_ids(prompt.texts[:1])]
            if None in parts and prompt is not prompts[0]:
                continue
            *parts, first = parts
            is_same = None not in parts and list(sum(parts, self._opening(prompt))) == whole
            if not is_same or len(first) != self._encoder.count(prompt.texts[0]):
                return self._refused(f"for one, with {prompt.texts[-1]!r}")
        return True

    def _refused(self, reason: str) -> bool:
        log.info(
            "tokenizer %r: parts of prompts have other token ids alone (%s); prompts are tokenized whole, which takes "
            "ten times as long",
            self._encoder.name,
            reason,
        )
        return False

    @cached_property
    def _spanning(self) -> re.Pattern[str] | None:
        """Matches texts that hold two blanks, SentencePiece's blank, or a token that spans a cut; None: there are too
        many of these."""
        tokenizer = self._encoder.tokenizer
        names = [name for name in tokenizer.get_vocab() if MAY_SPAN.search(name)]
        # Some decoders drop all blanks of a SentencePiece token that stands alone.
        texts = {
            text for name in names for text in (name.replace("\u2581", " "), tokenizer.convert_tokens_to_string([name]))
        }
        # What stands before a line end is not there when a line is tokenized alone.
        ends = {text[max(text.rfind("\n"), 0) :].lstrip(" ") for text in texts}
        spanning = sorted(filter(SPANS.search, ends))
        # Spelled in a text it is an added token, though no control token: normalizers begin again behind it.
        unknown = [str(tokenizer.unk_token)] * bool(tokenizer.unk_token)
        if len(spanning) > MAX_SPANNING:
            return None
        return re.compile("|".join([*map(re.escape, spanning), *map(re.escape, unknown), "  ", "\u2581"]))

    def _whole(self, prompt: Prompt, candidates: Sequence[str]) -> Encoded:
        prompts = [Prompt(prompt.words, (*prompt.texts[:-1], text or NO_SUMMARY)) for text in candidates]
        return Encoded((), tuple(map(tuple, self._encoder.encode(prompts))))

    def _split(self, prompt: Prompt) -> list[Line]:
        """One line for each text; the words before the first line end are left to ``_opening``."""
        words = [word.rpartition("\n") for word in prompt.words[:-1]]
        befores = [after for _, _, after in words]
        afters = [before + end for before, end, _ in words[1:]] + [prompt.words[-1] + self._encoder.tail]
        return list(zip(befores, prompt.texts, afters, strict=True))

    def _opening(self, prompt: Prompt) -> Ids:
        text = self._encoder.head + prompt.words[0][: prompt.words[0].rfind("\n") + 1]
        if text not in self._lines:
            self._lines.keep(text, tuple(self._encoder.ids([text])[0]), len(text))
        return self._lines[text]

    def _line_ids(self, lines: Sequence[Line]) -> list[Ids | None]:
        """Token ids of lines; None where a line has to be seen with the whole prompt."""
        missing = [line for line in dict.fromkeys(lines) if line not in self._lines]
        if missing:
            found = self._text_ids(["\n" + "".join(line) for line in missing])
            for line, ids in zip(missing, found, strict=True):
                is_ours = ids is not None and self._has_our_control_tokens(line, ids)
                self._lines.keep(line, ids if is_ours else None, len(line[1]))
        return [self._lines[line] for line in lines]

    def _has_our_control_tokens(self, line: Line, ids: Ids) -> bool:
        before, text, after = line
        if (before, after) not in self._control:
            harmless = self._encoder.part_ids([f"{ANCHOR}\n{before}{HARMLESS}{after}"])[0]
            self._control[before, after] = self._encoder.control_of(harmless[len(self._anchors["\n"]) :])
        return bool(text) and text == text.strip() and self._encoder.control_of(ids) == self._control[before, after]

    def _text_ids(self, texts: Sequence[str]) -> list[Ids | None]:
        """Token ids of texts without the line end before them; None where they are not those of their pieces."""
        split = [BLANK.split(text) for text in texts]
        missing = [piece for piece in dict.fromkeys(chain.from_iterable(split)) if piece not in self._pieces]
        if missing:
            alone = [ANCHOR + piece if piece[:1] in self._anchors else piece for piece in missing]
            for piece, ids in zip(missing, self._encoder.part_ids(alone), strict=True):
                self._pieces.keep(piece, self._without_anchor(piece, ids), len(piece))
        found = []
        for text, pieces in zip(texts, split, strict=True):
            parts = [self._pieces[piece] for piece in pieces]
            is_odd = None in parts or self._spanning.search(text)
            found.append(None if is_odd else tuple(chain.from_iterable(parts)))
        return found

    def _without_anchor(self, piece: str, ids: Sequence[int]) -> Ids | None:
        """None where the anchor's ids are not there."""
        anchor = self._anchors.get(piece[:1], [])
        if ids[: len(anchor)] != anchor:
            return None
        return tuple(self._numbers.setdefault(token, token) for token in ids[len(anchor) :])
