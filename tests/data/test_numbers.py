"""Splits, draws, times and filters against values worked out by hand: each border on both of its sides."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from trsr_dist.data.candidates import (
    ItemPool,
    category_pools,
    draw_negatives,
    draw_shown,
    pools_of,
    split_by_time,
    split_by_user,
)
from trsr_dist.data.histories import HistoryRules, admit_all
from trsr_dist.data.items import REMOVED, CatalogueRules
from trsr_dist.data.logs import ItemCodes, KnownUser, UserColumns, UserLogs, gather, unit_table
from trsr_dist.data.published import mind_seconds
from trsr_dist.data.samples import SampleRules, Samples, count_clicks
from trsr_dist.data.source import RawItem
from trsr_dist.errors import DataError
from trsr_dist.hashing import hash64, random_stream
from trsr_dist.records import Item, UserLog
from trsr_dist.run import SPLITS

NEVER = np.iinfo(np.int64).max


class TestSplits:
    def test_names_by_index(self) -> None:
        assert SPLITS == ("train", "valid", "test")

    def test_every_point_has_its_split(self) -> None:
        """Of 12 points 0 to 8 are train, 9 and 10 valid, 11 test."""
        users = [*map(str, range(300))]
        points, splits = [hash64("split", user) % 12 for user in users], split_by_user(users, (9, 2, 1)).tolist()
        found = {point: {split for one, split in zip(points, splits, strict=True) if one == point} for point in points}
        assert {point: split for point, (split,) in found.items()} == dict.fromkeys(range(9), 0) | {9: 1, 10: 1, 11: 2}

    def test_a_split_without_share_gets_nobody(self) -> None:
        users = [*map(str, range(50))]
        assert {*split_by_user(users, (1, 0, 1)).tolist()} == {0, 2}
        assert {*split_by_user(users, (1, 0, 0)).tolist()} == {0}

    def test_known_users_stay_where_they_are(self) -> None:
        """Of an earlier version: a change would move users of every data set from train to test."""
        assert split_by_user(["U8", "U13", "u0", "A1B2"], (10, 1, 1)).tolist() == [0, 0, 2, 1]

    def test_times_are_cut_by_rank_and_ties_by_hash(self) -> None:
        times, hashes = np.array([5, 3, 3, 9, 1, 3]), np.array([0, 7, 2, 0, 0, 5], np.uint64)
        order = [4, 2, 5, 1, 0, 3]
        splits = split_by_time(times, hashes, (3, 2, 1))
        assert splits[order].tolist() == [0, 0, 0, 1, 1, 2] and splits.dtype == np.int8
        assert split_by_time(times, hashes, (1, 1, 2))[order].tolist() == [0, 1, 1, 2, 2, 2], "shares are rounded down"
        assert split_by_time(times[:0], hashes[:0], (1, 1, 1)).tolist() == []


def shares(pool: ItemPool, excluded: set[int], before: int = 0, number: int = 1000) -> dict[int, float]:
    drawn = Counter(pool.draw(1, excluded, random_stream("share", i), before)[0] for i in range(number))
    return {row: count / number for row, count in drawn.items()}


class Fixed(random.Random):
    """Gives these numbers."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self._numbers = iter(numbers)

    def random(self) -> float:
        return next(self._numbers)


class TestDraws:
    def test_draws_are_those_of_an_earlier_version(self) -> None:
        """Others would give every data set other candidates. The last case looks at all items after its rounds."""
        pool = ItemPool(np.arange(40), np.arange(1, 41) ** 2)
        drawn = [pool.draw(4, {39}, random_stream("old", i)) for i in range(3)]
        assert drawn == [[27, 38, 24, 25], [33, 11, 31, 12], [31, 23, 18, 37]]
        heavy = ItemPool(np.arange(6), np.array([10**15, 1, 2, 3, 4, 5]))
        assert heavy.draw(4, {0}, random_stream("old")) == [2, 4, 5, 3]

    def test_items_seen_at_one_time_and_of_one_category_keep_their_order(self) -> None:
        weights, order = np.arange(1, 201), np.r_[0:200:2, 1:200:2]
        expected = ItemPool(order, weights[order]).draw(9, set(), random_stream(0))
        assert ItemPool(np.arange(200), weights, np.arange(200) % 2).draw(9, set(), random_stream(0), 2) == expected
        expected = ItemPool(order[:100], weights[::2]).draw(9, set(), random_stream(0))
        assert category_pools(["even", "odd"] * 100, weights)["even"].draw(9, set(), random_stream(0)) == expected

    def test_a_point_on_a_border_is_the_next_items(self) -> None:
        """Weights 1, 2 and 1 cover [0, 0.25), [0.25, 0.75) and [0.75, 1)."""
        pool = ItemPool(np.arange(3), np.array([1, 2, 1]))
        for point, row in ((0.0, 0), (0.2, 0), (0.25, 1), (0.7, 1), (0.75, 2), (1 - 2**-53, 2)):
            assert pool.draw(1, set(), Fixed(point, 0.0)) == [row]

    def test_items_seen_later_take_no_weight_from_the_others(self) -> None:
        """Rows 0 to 2 are old; row 3, seen later, has almost all the weight."""
        pool = ItemPool(np.arange(4), np.array([1, 2, 1, 10**6]), first_seen=np.array([1, 2, 3, 50]))
        assert shares(pool, set(), before=50) == pytest.approx({0: 0.25, 1: 0.5, 2: 0.25}, abs=0.05)
        assert shares(pool, set(), before=51)[3] > 0.99

    def test_heavy_items_come_first_where_all_are_looked_at(self) -> None:
        """Row 0 is excluded and has so much weight that no plain draw finds another."""
        pool = ItemPool(np.arange(4), np.array([10**15, 6, 3, 1]))
        assert shares(pool, {0}) == pytest.approx({1: 0.6, 2: 0.3, 3: 0.1}, abs=0.05)

    def test_what_was_drawn_before_all_are_looked_at_stays_and_counts(self) -> None:
        pool = ItemPool(np.arange(5), np.array([10**15, 10**15, 1, 1, 1]))
        for i in range(20):
            drawn = pool.draw(3, {0}, random_stream(i))
            assert drawn[0] == 1 and len(drawn) == len(set(drawn)) == 3 and 0 not in drawn

    def test_items_without_weight_are_never_drawn(self) -> None:
        pool = ItemPool(np.array([7, 8, 9]), np.array([1, 0, 1]))
        assert sorted(pool.draw(3, set(), random_stream(0))) == [7, 9]
        assert ItemPool(np.arange(2), np.zeros(2)).draw(1, set(), random_stream(0)) == []

    def test_without_a_time_nothing_was_seen(self) -> None:
        pool = ItemPool(np.arange(3), np.ones(3), np.array([0, 1, 2]))
        assert (
            pool.draw(1, set(), random_stream(0))
            == []
            == draw_negatives(lambda _: pool, [1], set(), 1, random_stream(0))
        )

    def test_nothing_wanted_draws_nothing(self) -> None:
        stream = random_stream(0)
        assert ItemPool(np.arange(2), np.ones(2)).draw(0, set(), stream) == []
        assert stream.random() == random_stream(0).random()

    def test_a_count_of_one_less_than_there_is(self) -> None:
        pool = ItemPool(np.arange(6), np.ones(6))
        for i in range(20):
            assert len(set(pool.draw(4, {5}, random_stream(i)))) == 4

    def test_pools_of_categories(self) -> None:
        categories, weights = ["b", "", "a", "b", "a"], np.array([1, 1, 1, 0, 2])
        pools = category_pools(categories, weights, np.array([5, 5, 5, 5, 9]))
        assert set(pools) == {"a", "b"}
        assert pools["b"].draw(3, set(), random_stream(0), before=6) == [0]
        assert pools["a"].draw(3, set(), random_stream(0), before=6) == [2]
        assert sorted(pools["a"].draw(3, set(), random_stream(0), before=10)) == [2, 4]
        of = pools_of(weights, categories=categories)
        assert (of(1), sorted(of(2).draw(9, set(), random_stream(0)))) == (None, [2, 4])
        whole = pools_of(weights * 7, np.array([1, 2, 3, 4, 5]))
        assert sorted(whole(1).draw(9, set(), random_stream(0), before=4)) == [0, 1, 2]
        timed = pools_of(weights, np.array([5, 5, 5, 5, 9]), categories)
        assert timed(4).draw(9, set(), random_stream(0), before=6) == [2]

    def test_negatives_are_dealt_over_the_targets(self) -> None:
        """Target 9 has no pool; what it cannot take goes to the next."""
        pools = {0: ItemPool(np.arange(10, 20), np.ones(10)), 1: ItemPool(np.arange(20, 40), np.ones(20))}
        drawn = draw_negatives(pools.get, [0, 9, 1], {12, 25}, 7, random_stream(0))
        assert [row // 10 for row in drawn[:2]] == [1, 1] and all(row >= 20 for row in drawn[2:])
        assert len(set(drawn)) == 7 and not set(drawn) & {0, 1, 9, 12, 25}

    def test_targets_and_earlier_negatives_are_not_drawn_again(self) -> None:
        pool = ItemPool(np.arange(6), np.ones(6))
        for i in range(10):
            assert sorted(draw_negatives(lambda target: pool, [0, 1], {2}, 9, random_stream(i))) == [3, 4, 5]

    def test_draws_pass_the_time_on(self) -> None:
        pool = ItemPool(np.arange(4), np.ones(4), np.array([1, 2, 3, 4]))
        assert sorted(draw_negatives(lambda target: pool, [0], set(), 3, random_stream(0), before=3)) == [1]

    def test_shown_items(self) -> None:
        drawn = draw_shown([1, 2, 2, 3, 4, 5], [5], {4}, 9, random_stream(0))
        assert sorted(drawn) == [1, 2, 3]
        assert len({tuple(draw_shown(range(5), [], set(), 2, random_stream(i))) for i in range(200)}) == 20


ROWS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "blank": REMOVED}
CODES = ItemCodes(ROWS, keep_unknown=True)


def in_columns(logs: Iterable[UserLog], counts: Counter[str]) -> UserLogs:
    """As one unit of the log."""
    table, error = unit_table(logs, CODES)
    assert error is None
    return gather(table.to_batches(), "repeats", counts)


def admitted(
    history: str, targets: str, shown: str = "", unknown_items: str = "skip", **changes: object
) -> tuple[KnownUser | None, dict[str, int]]:
    """Of a user whose items have names of one letter; and the counts but the number of ids, which is compared here."""
    rules = {"min_history": 1, "max_history": 0, "long_histories": "cut", "repeated_target": "keep"}
    counts: Counter[str] = Counter()
    log = UserLog("u", tuple(history.split()), tuple(targets.split()), 9, tuple(shown.split()), 3)
    logs, id_of = in_columns([log], counts), CODES.unknown.get if unknown_items == "fail" else None
    users = admit_all(logs, Path("f"), HistoryRules(**(rules | changes)), counts, id_of)
    user = users.user(0) if len(users) else None
    once = dict(counts)
    admit_all(logs, Path("f"), HistoryRules(**(rules | changes)), counts, id_of)
    assert counts == {name: 2 * number for name, number in once.items()}, "counts are added up over users"
    counts = Counter(once)
    assert counts.pop("item_ids_read", 0) == (len(f"{history} {targets} {shown}".split()) if history else 0)
    return user, dict(counts)


class TestHistories:
    def test_a_plain_user(self) -> None:
        user, counts = admitted("b a b", "c", "e c d")
        assert user == KnownUser("u", [1, 0, 1], [2], 9, [4, 3])
        assert counts == {"users_read": 1}

    @pytest.mark.parametrize(
        ("history", "targets", "changes", "reason"),
        [
            ("", "a", {}, "users_with_empty_history"),
            ("a", "", {}, "users_without_target"),
            ("a b", "c", {"min_history": 3}, "users_below_min_history"),
            ("a b a", "c", {"max_history": 2, "long_histories": "skip"}, "users_above_max_history"),
        ],
    )
    def test_who_is_left_out(self, history: str, targets: str, changes: dict, reason: str) -> None:
        assert admitted(history, targets, **changes) == (None, {"users_read": 1, reason: 1})

    def test_lengths_at_the_limits_are_in(self) -> None:
        assert admitted("a b", "c", min_history=2, max_history=2, long_histories="skip")[0].history == [0, 1]
        assert admitted("a", "c", min_history=1)[1] == {"users_read": 1}

    def test_a_long_history_is_kept_whole_and_cut_later(self) -> None:
        user, counts = admitted("a b d", "c", max_history=2)
        assert user.history == [0, 1, 3] and counts == {"users_read": 1, "users_with_cut_history": 1}

    def test_unknown_and_blank_items_go_and_are_counted(self) -> None:
        user, counts = admitted("a x blank b", "y c blank", "z d")
        assert (user.history, user.targets, user.shown) == ([0, 1], [2], [3])
        assert counts == {"users_read": 1, "clicks_on_unknown_items": 3, "clicks_on_items_without_text": 2}
        assert admitted("a", "x")[1] == {"users_read": 1, "clicks_on_unknown_items": 1, "users_without_target": 1}

    def test_an_unknown_item_is_named(self) -> None:
        for clicks in (("a x", "c"), ("a", "c x"), ("a", "c", "x")):
            with pytest.raises(DataError, match=r"f:3: user 'u' has item 'x'"):
                admitted(*clicks, unknown_items="fail")
        assert admitted("a blank", "c", unknown_items="fail")[0].history == [0]

    def test_equal_targets_are_one(self) -> None:
        assert admitted("a", "c b c")[0].targets == [2, 1]

    def test_repeated_targets(self) -> None:
        user, counts = admitted("a b", "b c a d", repeated_target="drop")
        assert user.targets == [2, 3] and counts == {"users_read": 1, "repeated_targets_dropped": 2}
        user, counts = admitted("a b", "b c", repeated_target="keep")
        assert user.targets == [1, 2] and counts == {"users_read": 1, "users_with_repeated_target_kept": 1}
        user, counts = admitted("a b", "b", repeated_target="drop")
        dropped = {"repeated_targets_dropped": 1, "users_with_repeated_target_dropped": 1}
        assert user is None and counts == {"users_read": 1} | dropped


@pytest.mark.parametrize("clock", ["12:00:00 AM", "1:05:09 AM", "11:59:59 PM", "12:30:01 PM", "01:5:09 pm"])
def test_times_of_mind(clock: str) -> None:
    expected = datetime.strptime(f"11/13/2019 {clock} +0000", "%m/%d/%Y %I:%M:%S %p %z").timestamp()
    assert mind_seconds(f"11/13/2019 {clock}") == expected


class TestColumns:
    """Users with gaps between their batches; nobody but those of ``own`` has a time."""

    own = {
        0: (("a", "b"), ("c",), 100, ("d",)),
        1: (("c",), ("a",), 70, ()),
        2: (("e",), ("e",), 90, ("c",)),
        5: (("d",), ("b",), 60, ()),
        8: (("b",), ("d",), 95, ("b",)),
    }

    def users(self, *but: int) -> UserColumns:
        plain, counts = (("a",), ("b",), 0, ()), Counter()
        logs = in_columns((UserLog(f"u{i}", *self.own.get(i, plain)) for i in range(10) if i not in but), counts)
        return admit_all(logs, Path("f"), HistoryRules(1, 0, "cut", "keep"), counts, None)

    def test_first_seen(self) -> None:
        """Histories were met a second before the target's time, targets and shown items at it."""
        assert self.users().first_seen(6).tolist() == [70, 60, 69, 59, 89, NEVER]
        assert self.users(1).first_seen(6).tolist() == [99, 60, 90, 59, 89, NEVER]
        assert self.users(1, 2, 5).first_seen(6).tolist() == [99, 94, 100, 95, NEVER, NEVER]
        assert self.users(*self.own).first_seen(6).tolist() == [NEVER] * 6

    def test_counts(self) -> None:
        users, everyone = self.users(), np.ones(10, bool)
        assert users.count("history", everyone, 6).dtype == np.int64
        assert users.count("history", everyone, 6).tolist() == [6, 2, 1, 1, 1, 0]
        assert users.count("targets", np.arange(10) != 5, 6).tolist() == [1, 5, 1, 1, 1, 0]
        assert users.count("shown", everyone, 6).tolist() == [0, 1, 1, 1, 0, 0]
        splits = np.where(np.arange(10) % 2, 2, 0)
        clicks = count_clicks(users, splits, Samples.of(users, splits, SampleRules(1, 1, 1)), 6)
        assert clicks[0].tolist() == [users.count(name, splits == 0, 6).tolist() for name in ("history", "targets")]
        assert clicks.sum(axis=0)[0].tolist() == [6, 2, 1, 1, 1, 0]

    def test_users_of_a_table(self) -> None:
        users = self.users()
        same = UserColumns.from_arrow(users.table().to_batches(max_chunksize=4))
        assert [same.user(place) for place in range(10)] == [users.user(place) for place in range(10)]
        assert same.user(0) == KnownUser("u0", [0, 1], [2], 100, [3])
        assert UserColumns.from_users([users.user(5)]).joined(users).user(0) == KnownUser("u5", [3], [1], 60, [])

    def test_a_users_first_row_counts(self) -> None:
        counts = Counter()
        logs = [UserLog("u", (name,), ("b",), counted="seen", row=row) for row, name in enumerate("ac", 1)]
        units = [unit_table([log], CODES)[0].to_batches()[0] for log in logs]
        found = gather(units, "repeats", counts)
        assert found.users.user(0).history == [0] and found.rows.tolist() == [1]
        assert counts == {"repeats": 1, "seen": 1}

    def test_items(self) -> None:
        raw = [RawItem("b", {"text": "a  lamp"}, 1, "home"), RawItem("a", {}, 2), RawItem("c", {"text": "tea"}, 3)]
        rules = CatalogueRules(Path("raw"), (), "skip", "fail", Counter())
        assert list(rules.admit(raw)) == [Item("b", "a lamp", "home"), Item("c", "tea", "")]
        assert rules.rows == {"b": 0, "a": REMOVED, "c": 1}
