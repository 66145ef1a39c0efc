import dataclasses

import pytest

from trsr_dist.records import Candidate, Item


def test_records_are_frozen_and_compare_by_value() -> None:
    item = Item("n1", "a title")
    assert item == Item("n1", "a title", category="")
    with pytest.raises(dataclasses.FrozenInstanceError):
        item.text = "other"
    assert Candidate("n1", "a title", 1) != Candidate("n1", "a title", 0)
