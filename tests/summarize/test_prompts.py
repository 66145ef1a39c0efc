"""Trimming of prompts and the quality gate."""

import pytest

from trsr_dist.errors import DataError
from trsr_dist.prompts.text import SummaryPrompt, block_instruction
from trsr_dist.prompts.trimming import trim_prompt
from trsr_dist.summarize.quality import clean, flags_of


def num_words(prompt: SummaryPrompt) -> int:
    return len(prompt.text().split())


def test_long_descriptions_pay_first_and_the_instruction_never() -> None:
    prompt = SummaryPrompt("do this now", ("an earlier summary",), ("short one", "long " * 50, "long " * 40))
    fitted, cut = trim_prompt(prompt, num_words, 40)
    assert num_words(fitted) <= 40 < num_words(fitted) + 3
    assert fitted.instruction == prompt.instruction and fitted.previous == prompt.previous
    assert fitted.items[0] == "short one"
    assert len(fitted.items[1].split()) == len(fitted.items[2].split())
    assert cut == num_words(prompt) - num_words(fitted)


def test_summaries_pay_when_items_are_gone() -> None:
    prompt = SummaryPrompt("do this", ("old " * 30, "new " * 30), ("item " * 5,))
    fitted, _ = trim_prompt(prompt, num_words, 30)
    assert fitted.items == ("",) and 0 < len(fitted.previous[0].split()) == len(fitted.previous[1].split())


def test_a_prompt_that_fits_is_left_alone() -> None:
    prompt, counted = SummaryPrompt("do this", (), ("item",)), []
    assert trim_prompt(prompt, lambda tried: counted.append(tried) or num_words(tried), 100) == (prompt, 0)
    assert counted == [prompt], "and counted once"


def test_an_instruction_over_the_limit_is_an_error() -> None:
    with pytest.raises(DataError, match="summarize.max_prompt_tokens"):
        trim_prompt(SummaryPrompt("word " * 30, (), ("item",)), num_words, 10)


@pytest.mark.parametrize(
    ("raw", "cut", "flags"),
    [
        ("Likes tennis and finance.", False, ()),
        ("", False, ("empty",)),
        (" \n ... ", False, ("empty",)),
        (f"Sure. {block_instruction('news')}", False, ("echo",)),
        ("Likes tennis.\n[Items]\n- another", False, ("run_on",)),
        ("Likes tennis. Summary: likes", False, ("run_on",)),
        ("Likes tennis, finance, news of stocks and all that has to do with gardens.\nSummary: x", False, ("run_on",)),
        ("Likes tennis.\nSummary: likes\nSummary: likes", False, ("run_on",)),
        ("the user likes " * 10, False, ("repetition",)),
        ("Likes tennis and", True, ("cut",)),
        ("the user likes " * 10, True, ("repetition", "cut")),
    ],
)
def test_faults_have_names(raw: str, cut: bool, flags: tuple[str, ...]) -> None:
    text, run_on = clean(raw)
    assert flags_of(text, SummaryPrompt(block_instruction("news")), run_on, cut) == flags


def test_what_follows_the_next_turns_marker_is_cut_away() -> None:
    assert clean("Likes\n tennis.\n[Items]\n- more") == ("Likes tennis.", True)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("**Summary:** The user likes tea.", "The user likes tea."),
        ("**Updated Summary:**\n\nThe user likes tea.", "The user likes tea."),
        ("Here is the updated Summary: The user likes tea.", "The user likes tea."),
        ("Here is a summary of what the user read:\n\n**Summary:** The user likes tea.", "The user likes tea."),
        ("Here is the Summary:\n\n**Summary:** The user likes tea.", "The user likes tea."),
        (
            "Based on the news articles that you gave me, the user's preferences can be put as follows:\n\nSummary: "
            "The user likes tea.",
            "The user likes tea.",
        ),
        ("# Summary of User Preferences\n\n**Summary:** The user likes tea.", "The user likes tea."),
        ("Sure, with pleasure.\n\nSummary:\n\nThe user likes tea.", "The user likes tea."),
        ("<think>Tea, cups.\nSummary: so\n</think>\n\nThe user likes tea.", "The user likes tea."),
        ("Tea, cups.</think>The user likes tea.", "The user likes tea."),
        ("<think>Tea, cups, and then", ""),
        ("The user likes tea.", "The user likes tea."),
    ],
)
def test_titles_announcements_and_thoughts_of_chat_models_are_left_out(raw: str, text: str) -> None:
    assert clean(raw) == (text, False)
