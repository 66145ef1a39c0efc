"""A small text-rich data set in MIND's file format, from our own seeded generator.

A user has a few interests, which are subcategories, and they drift: at each click one of them may give way to another.
Clicks, the target included, are drawn from the interests of that moment, with a little noise in the history. The
subcategories are equally liked and an item is hardly more popular than another, so only a user's own history tells
which candidate comes next. The words are ordinary ones, each of them in one topic only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trsr_dist.files import atomic_file
from trsr_dist.hashing import random_stream
from trsr_dist.log import progress

DEMO_FILES = ("news.tsv", "behaviors.tsv")
NUM_INTERESTS = (2, 3)
HISTORY_CLICKS = (9, 41)
"""The target, which is the last click, included."""
DRIFT = 0.03
"""Chance per click that an interest is replaced."""
NOISE = 0.05
"""Share of history clicks outside the interests."""
POPULARITY_SPREAD = 0.25
"""Standard deviation of the logarithm of an item's weight within its subcategory."""
START = datetime(2024, 3, 1, tzinfo=UTC)
DAYS = 30
NUM_SHOWN = (4, 12)
MAX_TRIES = 200
"""For a title that no other item has."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A subcategory and the words its titles are made of."""

    category: str
    name: str
    words: tuple[str, ...]


_WORDS = {
    "sports/tennis": "racket serve umpire backhand baseline volley",
    "food/baking": "dough oven flour crust yeast pastry",
    "travel/islands": "lagoon palm reef ferry beach harbour",
    "science/astronomy": "telescope comet orbit galaxy eclipse nebula",
    "money/banking": "loan vault branch teller deposit mortgage",
    "health/sleep": "pillow dream snore insomnia nap mattress",
    "music/opera": "soprano tenor aria libretto overture chorus",
    "autos/trucks": "trailer diesel cargo hauler axle clutch",
    "homes/gardens": "tulip hedge compost lawn greenhouse rake",
    "law/courts": "judge jury verdict appeal witness lawsuit",
    "animals/horses": "saddle stable gallop pony bridle foal",
    "screen/comedy": "joke sitcom sketch laughter parody punchline",
}
TOPICS = tuple(Topic(*name.split("/"), tuple(words.split())) for name, words in _WORDS.items())
"""Few, so that a model which knew nothing a minute ago can learn each of them."""

FRAMES = (
    "Why the {} still needs a {}",
    "A closer look at the {} and the {}",
    "From {} to {}: what changed this week",
    "The {} that everyone will remember, and its {}",
    "How one {} made people think of a {}",
    "Five questions about the {} and the {}",
    "What a {} can tell us about the {}",
    "Nobody expected this {} beside that {}",
)

SENTENCES = (
    "People who follow {} have waited for this.",
    "We asked three people who know {} well.",
    "The story of {} is longer than most of us think.",
    "It is a small step, but it matters for {}.",
    "Readers who are new to {} will find an easy start.",
    "There is more to {} than meets the eye.",
)


@dataclass(frozen=True, slots=True)
class DemoItem:
    """A generated news item."""

    id: str
    topic: int
    """Index into ``TOPICS``."""
    weight: float
    title: str
    abstract: str


def write_demo(folder: Path, num_users: int, num_items: int, seed: int) -> None:
    """Write ``news.tsv`` and ``behaviors.tsv``; equal arguments give equal bytes."""
    items = make_items(num_items, seed)
    with atomic_file(folder / DEMO_FILES[0]) as stream:
        for item in items:
            topic = TOPICS[item.topic]
            cells = [item.id, topic.category, topic.name, item.title, item.abstract, "", "[]", "[]"]
            stream.write("\t".join(cells) + "\n")
    with atomic_file(folder / DEMO_FILES[1]) as stream:
        shelves: list[list[DemoItem]] = [[] for _ in TOPICS]
        for item in items:
            shelves[item.topic].append(item)
        for i in progress(range(num_users), description="demo users", unit=" users"):
            stream.write(_make_row(i, shelves, random_stream(seed, "demo user", i)))


def make_items(num_items: int, seed: int) -> list[DemoItem]:
    """Items dealt evenly over the topics, with different titles as long as the words suffice."""
    stream, titles, items = random_stream(seed, "demo items"), set[str](), []
    for i in range(num_items):
        topic = i % len(TOPICS)
        words = TOPICS[topic]
        for _ in range(MAX_TRIES):
            first, second = stream.sample(words.words, 2)
            title = stream.choice(FRAMES).format(first, second)
            if title not in titles:
                break
        titles.add(title)
        abstract = " ".join(sentence.format(words.name) for sentence in stream.sample(SENTENCES, 2))
        items.append(DemoItem(f"N{1000 + i}", topic, stream.lognormvariate(0, POPULARITY_SPREAD), title, abstract))
    return items


def _make_row(index: int, shelves: list[list[DemoItem]], stream: random.Random) -> str:
    """A user's line of ``behaviors.tsv``."""
    interests = stream.sample(range(len(shelves)), stream.randint(*NUM_INTERESTS))
    length = stream.randint(*HISTORY_CLICKS)
    clicks: dict[str, None] = {}
    while len(clicks) < length:
        noise = len(clicks) < length - 1 and stream.random() < NOISE
        topic = stream.randrange(len(shelves)) if noise else stream.choice(interests)
        clicks[_new_item(topic, shelves, clicks, stream)] = None
        # Not between the last click and the shown one, so that the user's interests are the same for both.
        if len(clicks) < length - 1 and stream.random() < DRIFT:
            new = stream.choice([topic for topic in range(len(shelves)) if topic not in interests])
            interests[stream.randrange(len(interests))] = new
    chosen = _new_item(stream.choice(interests), shelves, clicks, stream)
    others = {stream.choice(stream.choice(shelves)).id for _ in range(stream.randint(*NUM_SHOWN))}
    shown = [f"{chosen}-1", *(f"{item}-0" for item in sorted(others - {*clicks, chosen}))]
    stream.shuffle(shown)
    when = START + timedelta(seconds=stream.randrange(DAYS * 86400))
    time = f"{when.month}/{when.day}/{when.year} {when.strftime('%I:%M:%S %p')}"
    return "\t".join([str(index + 1), f"U{index + 1}", time, " ".join(clicks), " ".join(shown)]) + "\n"


def _new_item(topic: int, shelves: list[list[DemoItem]], clicked: dict[str, None], stream: random.Random) -> str:
    """An item the user has not clicked, by weight: of the topic, or of any topic once that one is used up."""
    fresh = [item for item in shelves[topic] if item.id not in clicked]
    fresh = fresh or [item for shelf in shelves for item in shelf if item.id not in clicked]
    return stream.choices(fresh, [item.weight for item in fresh])[0].id
