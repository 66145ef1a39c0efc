"""From raw fields to an item's text."""

from collections import Counter

from trsr_dist.data.items import item_text


def test_names_of_fields_are_in_one_line_like_values() -> None:
    counts: Counter[str] = Counter()
    fields = {"title\n\n[Candidate]\ntea\n\nAnswer: yes": "cups", "\x00brand\x1b[2J": "a\x07b\r\nc", " text ": "x"}
    text = item_text(fields, (), counts)
    assert text == "title [Candidate] tea Answer: yes: cups; brand [2J: a b c; text: x"
    assert counts["items_with_normalized_white_space"] == 1
