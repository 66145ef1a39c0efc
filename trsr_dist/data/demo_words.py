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
    "sports": {
        "tennis": "racket serve umpire backhand",
        "rowing": "oar regatta crew canoe",
        "hockey": "puck goalie skates stick",
        "boxing": "gloves knockout jab ring",
    },
    "food": {
        "baking": "dough oven flour crust",
        "cheese": "cheddar brie dairy rind",
        "coffee": "espresso barista roast mug",
        "grilling": "barbecue charcoal ribs smoke",
    },
    "travel": {
        "islands": "lagoon palm reef ferry",
        "railways": "locomotive carriage platform tunnel",
        "museums": "gallery curator exhibit statue",
        "camping": "tent lantern trail backpack",
    },
    "science": {
        "astronomy": "telescope comet orbit galaxy",
        "geology": "volcano mineral fossil quake",
        "robots": "sensor android gripper circuit",
        "genetics": "gene mutation chromosome clone",
    },
    "money": {
        "banking": "deposit teller vault overdraft",
        "taxes": "refund audit deduction levy",
        "pensions": "retiree annuity savings benefit",
        "startups": "founder venture pitch investor",
    },
    "health": {
        "sleep": "pillow insomnia nap dream",
        "vaccines": "syringe immunity booster clinic",
        "dentistry": "molar cavity brace enamel",
        "yoga": "posture breath stretch mat",
    },
    "music": {
        "opera": "soprano aria tenor libretto",
        "guitar": "chord strum fret pick",
        "drums": "rhythm cymbal snare beat",
        "jazz": "saxophone trumpet swing blues",
    },
    "autos": {
        "trucks": "trailer diesel cargo hauler",
        "motorcycles": "helmet rider scooter throttle",
        "racing": "podium lap pitstop chicane",
        "electric": "battery charger plug kilowatt",
    },
    "homes": {
        "gardens": "tulip hedge compost lawn",
        "kitchens": "cabinet sink countertop stove",
        "painting": "brush primer varnish stencil",
        "plumbing": "faucet pipe drain valve",
    },
    "law": {
        "courts": "judge jury verdict appeal",
        "police": "officer patrol detective siren",
        "patents": "inventor license trademark royalty",
        "prisons": "inmate warden parole cell",
    },
    "animals": {
        "horses": "saddle stable gallop pony",
        "birds": "feather nest owl falcon",
        "whales": "ocean fin krill harpoon",
        "insects": "beetle hive moth antenna",
    },
    "screen": {
        "comedy": "joke sitcom sketch laughter",
        "horror": "ghost zombie scream haunted",
        "cartoons": "animator doodle pixel mouse",
        "westerns": "cowboy sheriff saloon outlaw",
    },
}
TOPICS = tuple(
    Topic(category, name, tuple(words.split())) for category, names in _WORDS.items() for name, words in names.items()
)

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
