"""The control gives everyone another user's text and leaves candidates and labels alone."""

import pytest

from trsr_dist.errors import DataError
from trsr_dist.evaluate.control import change_sample, derangement
from trsr_dist.records import Candidate, Sample

SAMPLE = Sample("a", "do", "likes tea", ("t1", "t2"), (Candidate("x", "text", 1), Candidate("y", "other", 0)))
OTHER = Sample("b", "do", "likes jazz", ("j1",), (Candidate("z", "third", 1),))


@pytest.mark.parametrize("num_users", [2, 3, 10, 501])
def test_everyone_gets_another_user_and_everyone_is_given_once(num_users: int) -> None:
    others = derangement(num_users, seed=3)
    assert sorted(others) == list(range(num_users))
    assert all(other != user for user, other in enumerate(others))
    assert others == derangement(num_users, seed=3)
    assert num_users < 10 or others != derangement(num_users, seed=4)


def test_one_user_has_no_other() -> None:
    with pytest.raises(DataError, match="at least 2 users"):
        derangement(1, seed=0)


def test_changes_touch_only_their_part() -> None:
    control = change_sample(SAMPLE, "control", OTHER)
    assert (control.summary, control.recent) == (OTHER.summary, OTHER.recent)
    assert (control.user, control.candidates, control.instruction) == ("a", SAMPLE.candidates, "do")
    bare = change_sample(SAMPLE, "no_summary")
    assert (bare.summary, bare.recent) == ("", SAMPLE.recent)
    short = change_sample(SAMPLE, "no_recent")
    assert (short.summary, short.recent) == (SAMPLE.summary, ())
    assert change_sample(SAMPLE, "none") is SAMPLE
