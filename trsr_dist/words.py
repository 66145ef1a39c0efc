"""What counts as a word, in scripts with blanks between words and in those without. Pure.

Han, kana, Thai, Lao, Burmese and Khmer texts have no blanks within a phrase. Where a length counts, two of their
characters are a word. Where words are compared, overlapping n-grams are, so that it does not matter where a run begins:
bigrams of Han and kana, and of Korean, whose words carry their particles (as Lucene's CJK analyzer makes them), and
trigrams of the alphabets of Southeast Asia, whose bigrams say little more than two letters of English would.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import accumulate

HAN = r"\u3005-\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U000323af"
HIRAGANA = r"\u3040-\u309f"
KATAKANA = r"\u30a0-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HANGUL = r"\uac00-\ud7a3"
SOUTHEAST_ASIAN = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
UNSPACED = SOUTHEAST_ASIAN + HIRAGANA + KATAKANA + HAN
"""Scripts without blanks between words, for use within a character class."""
MARKS = "".join(chr(c) for c in range(0x300, 0x1D00) if unicodedata.category(chr(c)) in ("Mn", "Mc"))
"""Vowel signs, accents and the like, which ``\\w`` does not match: words of Hindi or Thai are not cut at them."""
INVISIBLE = (
    r"\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    r"\u3164\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff"
)
"""Control characters and those that Unicode has programs ignore by default (zero-width ones among them)."""

_VISIBLE = re.compile(rf"[^\s{INVISIBLE}]")
_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}{INVISIBLE}][^\s{UNSPACED}]*")
_PIECE = re.compile(rf"[\s{INVISIBLE}]*(?:[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}{INVISIBLE}][^\s{UNSPACED}]{{0,15}})")
_IGNORED = re.compile(rf"[{INVISIBLE}]")
_LETTERS = re.compile(rf"[\w{MARKS}]+")
_ASCII_LETTERS = re.compile(r"\w+")
_RUN = re.compile(
    rf"(?P<bigrams>[{HIRAGANA}{KATAKANA}{HAN}{HANGUL}]+)|(?P<trigrams>[{SOUTHEAST_ASIAN}]+)|[^{UNSPACED}{HANGUL}]+"
)
_GRAM_SIZES = {"bigrams": 2, "trigrams": 3}


def has_text(text: str) -> bool:
    """Whether there is anything to see."""
    return _VISIBLE.search(text) is not None


def split_words(text: str) -> list[str]:
    """As ``str.split``, but in scripts without blanks two characters are a word."""
    return text.split() if text.isascii() else _WORD.findall(text)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Where the words of ``split_words`` begin and end."""
    return [match.span() for match in _WORD.finditer(text)]


def count_words(text: str) -> int:
    """Words as ``cut_words`` counts them."""
    return len(_PIECE.findall(text))


def cut_words(text: str, num_words: int) -> str:
    """The first ``num_words`` words; runs of more than 16 characters are cut within, so that any text can be cut."""
    return "".join(_PIECE.findall(text)[:num_words]).strip()


def word_heads(text: str) -> list[str]:
    """What ``cut_words`` leaves of a text for each number of words, from none to all."""
    ends = accumulate(map(len, _PIECE.findall(text)), initial=0)
    return [text[:end].strip() for end in ends]


def letter_runs(text: str) -> list[str]:
    """Runs of letters, digits and underscores, in one case, without invisible characters and full-width forms."""
    if text.isascii():
        return _ASCII_LETTERS.findall(text.lower())
    # A zero-width space stands between words; the other invisible characters stand within them.
    folded = unicodedata.normalize("NFKC", text.replace("\u200b", " ")).casefold()
    return _LETTERS.findall(_IGNORED.sub("", " ".join(folded.split())))


def comparable(text: str) -> str:
    """Letters alone, in one case, for comparing whole texts; of a text without letters, the text itself."""
    return " ".join(letter_runs(text)) or " ".join(text.split())


def search_terms(text: str) -> list[str]:
    """Terms that two texts about the same have in common: words in one case, n-grams where blanks do not part them."""
    terms: list[str] = []
    for run in letter_runs(text):
        if run.isascii():
            terms.append(run)
            continue
        for match in _RUN.finditer(run):
            part = match[0]
            size = _GRAM_SIZES.get(match.lastgroup or "", len(part))
            terms += [part[i : i + size] for i in range(max(1, len(part) - size + 1))]
    return terms
