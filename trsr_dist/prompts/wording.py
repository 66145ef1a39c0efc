"""The words of the prompts, per domain: the method's parts and intent (arXiv 2403.13325) in our own words."""

from __future__ import annotations

from dataclasses import dataclass

WORDING_VERSION = 3
"""Raised whenever a text below or the way texts are cut changes; it is part of every prompt hash."""


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
