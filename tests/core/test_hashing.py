"""Hashes against those of coreutils: they name folders and decide draws, so no machine or version may change them."""

from __future__ import annotations

import random

import pytest

from trsr_dist.hashing import ListDigest, digest, hash64, random_stream

DIGESTS = [
    ([], "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"),
    ([1], "080a9ed428559ef602668b4c00f114f1a11c3f6b02a435f0bdc154578e4d7f22"),
    ([1, {"b": 2, "a": "\u00e9"}], "351f304e869fd755acae6cb5d5c2bfcb7cc6d98ba664b14e22c105c4826eebe1"),
]
"""As ``printf '[1,{"a":"\u00e9","b":2}]' | sha256sum`` gives them."""


@pytest.mark.parametrize(("value", "expected"), DIGESTS)
def test_digests_are_of_canonical_json(value: list, expected: str) -> None:
    assert digest(value) == expected
    one_by_one = ListDigest()
    for entry in value:
        one_by_one.hexdigest()
        one_by_one.add(entry)
    assert one_by_one.hexdigest() == one_by_one.hexdigest() == expected


def test_hashes_are_those_of_blake2b() -> None:
    """As ``printf '1\\x1fa' | b2sum -l 64`` gives them."""
    assert hash64(1, "a") == hash64("1", "a") == 0x0D35CA1552F972F7
    assert hash64(7) == 0xE75017CACE788F82


def test_a_stream_is_named_by_its_keys() -> None:
    assert random_stream(3, "u").random() == 0.8146833098823901
    assert random_stream(7).random() == random.Random(0xE75017CACE788F82).random()
