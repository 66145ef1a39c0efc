import pytest

from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize.extract import extract, split_fields
from trsr_dist.summarize.plans import planner
from trsr_dist.summarize.plans.graph import node_prompt

TENNIS = "category: sports; subcategory: tennis; title: A quiet final in the rain"
MARKETS = "category: finance; subcategory: markets; title: Stocks rise for a third day in a row"


def summarize(items: list[str], scheme: str, max_words: int) -> str:
    """The whole plan, by hand."""
    plan = planner(scheme)(len(items), 5, 3)
    texts: list[str] = []
    for node in plan:
        prompt = node_prompt(node, items, [texts[parent] for parent in node.parents], "news")
        texts.append(extract(prompt, max_words))
    return texts[-1]


def test_topics_come_first_by_frequency() -> None:
    text = extract(SummaryPrompt("", (), (MARKETS, TENNIS, TENNIS)), 40)
    assert text.startswith("sports/tennis (2), finance/markets; words: ")


@pytest.mark.parametrize("scheme", ["hierarchical", "recurrent"])
@pytest.mark.parametrize("num_items", [5, 23, 60])
def test_merges_and_updates_add_counts_up(scheme: str, num_items: int) -> None:
    items = [TENNIS if i % 3 else MARKETS for i in range(num_items)]
    tennis = sum(item == TENNIS for item in items)
    text = summarize(items, scheme, 60)
    assert text.startswith(f"sports/tennis ({tennis}), finance/markets ({num_items - tennis}); words: ")
    assert f"final ({tennis})" in text


@pytest.mark.parametrize("max_words", [1, 5, 10, 40])
def test_the_limit_holds_and_the_text_is_never_empty(max_words: int) -> None:
    items = [f"category: c{i}x; subcategory: s{i}x; title: something about thing{i}x and more" for i in range(50)]
    for scheme in ("hierarchical", "recurrent"):
        text = summarize(items, scheme, max_words)
        assert 0 < len(text.split()) <= max_words


def test_different_users_get_different_summaries() -> None:
    assert summarize([TENNIS] * 8, "hierarchical", 20) != summarize([MARKETS] * 8, "hierarchical", 20)


def test_ties_go_to_what_is_recent() -> None:
    assert extract(SummaryPrompt("", (), (TENNIS, MARKETS)), 40).startswith("finance/markets, sports/tennis")


def test_fields_of_products() -> None:
    text = "title: Noise cancelling headphones with a microphone; brand: Sonorous; price: 12.99; color: dark blue"
    assert split_fields(text) == ([], ["Sonorous", "dark blue"], "Noise cancelling headphones with a microphone 12.99")
    assert extract(SummaryPrompt("", (), (text,)), 20).startswith("dark blue, Sonorous; words: ")


@pytest.mark.parametrize(
    "name", ["product-title", "title (short)", "item/title", "title.en", "title #1", "title & more"]
)
def test_field_names_of_tables_are_no_words_of_the_summary(name: str) -> None:
    items = tuple(f"{name}: {title}; brand: Acme" for title in ("A blue tent for all", "A green tent for two"))
    assert extract(SummaryPrompt("", (), items), 20) == "Acme (2); words: tent (2), green, blue"


@pytest.mark.parametrize("text", ["2020", "no", ";", "a: b", "plain words; not: fields"])
def test_any_text_gives_some_summary(text: str) -> None:
    assert extract(SummaryPrompt("", (), (text,)), 10)
    assert extract(SummaryPrompt("", (text,), ()), 10)


def test_terms_that_end_as_a_count_does_are_read_back_as_they_are() -> None:
    """Heat (1995), seen once, is no Heat that was seen 1995 times; a word that ends in "words:" opens no list."""
    items = tuple(f"genre: drama; title: {title}" for title in ("Heat (1995)", "Alien (1979)", "Alien (1979)"))
    once = extract(SummaryPrompt("", (), items), 50)
    assert once == "drama/Alien (1979) (2), drama/Heat (1995) (1)"
    assert extract(SummaryPrompt("", (once, once), ()), 50) == "drama/Alien (1979) (4), drama/Heat (1995) (2)"
    bare = extract(SummaryPrompt("", (), ("It (2017), Up (2009)",)), 50)
    assert bare == "It (2017) (1), Up (2009) (1)", "a text in which nothing tells, taken as it is"
    both = extract(SummaryPrompt("", (bare, bare), ("Space Jam", "Space Odyssey")), 50)
    assert both == "It (2017) (2), Up (2009) (2); words: space (2), odyssey"
    topic = extract(SummaryPrompt("", (), ("kind: Passwords: why; title: Tech",)), 50)
    assert extract(SummaryPrompt("", (topic,), ()), 50) == topic == "Passwords: why/Tech"
    assert extract(SummaryPrompt("", (), ("kind: a\nbc",)), 50) == "a\nbc", "any text is a term"
