"""The demo's vocabulary: ordinary words, each of them in one topic only."""

from __future__ import annotations

from dataclasses import dataclass


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
