"""Journal and cache: whatever a kill leaves behind, complete records stay and nothing false is ever read."""

from pathlib import Path

import pytest

from trsr_dist.hashing import digest
from trsr_dist.prompts.text import SummaryPrompt
from trsr_dist.summarize import cache as cache_module
from trsr_dist.summarize.cache import JournalWriter, TextCache, pack, prompt_hash, scan


def record(number: int) -> dict:
    return {"key": digest(number)[:32], "text": f"text {number} é \n line", "flags": []}


def test_a_journal_cut_at_any_byte_keeps_its_complete_records(tmp_path: Path) -> None:
    lines = [pack(record(i)) for i in range(4)]
    whole, ends = b"".join(lines), [sum(map(len, lines[: i + 1])) for i in range(4)]
    path = tmp_path / "a.journal"
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = [key for _, _, key in scan(path)]
        assert found == [record(i)["key"] for i in range(sum(end <= size for end in ends))]


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    lines = [pack(record(i)) for i in range(3)]
    start, stop = len(lines[0]), len(lines[0]) + len(lines[1])
    for place in range(start, stop):
        damaged = bytearray(b"".join(lines))
        damaged[place] ^= 0x04
        (tmp_path / "a.journal").write_bytes(damaged)
        cache = TextCache(tmp_path, "reader")
        found = [cache.get(record(i)["key"]) for i in range(3)]
        cache.close()
        assert found in ([record(0), None, record(2)], [record(0), None, None])


def test_a_live_task_sees_what_others_add(tmp_path: Path) -> None:
    one, two = TextCache(tmp_path, "one"), TextCache(tmp_path, "two")
    one.add(record(1))
    assert two.get(record(1)["key"]) is None
    two.refresh()
    assert two.get(record(1)["key"]) == record(1)
    one.add(record(2))
    two.refresh()
    assert two.get(record(2)["key"]) == record(2) and one.get(record(2)["key"]) == record(2)


def test_a_half_written_line_of_a_live_task_is_read_once_it_is_whole(tmp_path: Path) -> None:
    line = pack(record(1))
    path = tmp_path / "live.journal"
    path.write_bytes(line[:20])
    reader = TextCache(tmp_path, "reader")
    path.write_bytes(line)
    reader.refresh()
    assert reader.get(record(1)["key"]) == record(1) and reader.num_damaged == 0


def test_the_sorted_index_finds_everything(tmp_path: Path, monkeypatch: object) -> None:
    monkeypatch.setattr(cache_module, "MERGE_AT", 7)
    cache = TextCache(tmp_path, "a")
    for number in range(100):
        cache.add(record(number))
    newer = {**record(3), "text": "newer"}
    cache.add(newer)
    for number in range(100):
        assert cache.get(record(number)["key"]) == (newer if number == 3 else record(number))
    assert cache.get(record(1000)["key"]) is None


def test_a_journal_is_never_written_by_two(tmp_path: Path) -> None:
    JournalWriter(tmp_path / "a.journal")
    with pytest.raises(FileExistsError):
        JournalWriter(tmp_path / "a.journal")


def test_a_prompts_hash_changes_with_all_that_its_words_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*parts: object) -> str:
        return prompt_hash(SummaryPrompt(*parts))

    keys = {
        key("a", ("b",), ("c",)),
        key("a", (), ("b", "c")),
        key("a", ("b", "c"), ()),
        key("a2", ("b",), ("c",)),
    }
    assert len(keys) == 4
    assert key("a", ("b",), ("c",)) in keys
    monkeypatch.setattr(cache_module, "WORDING_VERSION", -1)
    assert key("a", ("b",), ("c",)) not in keys


def test_a_cache_cut_at_any_byte_gives_true_texts_or_none(tmp_path: Path) -> None:
    """As a kill leaves it: what is left is used, the rest is made again, and the next task reads both."""
    records = [record(i) for i in range(3)]
    whole = b"".join(map(pack, records))
    for size in range(len(whole) + 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "killed.journal").write_bytes(whole[:size])
        again = TextCache(folder, "again")
        for one in records:
            if again.get(one["key"]) is None:
                again.add(one)
        again.close()
        assert [TextCache(folder, "later").get(one["key"]) for one in records] == records


def test_many_journals_are_read_with_few_open_files(tmp_path: Path) -> None:
    for number in range(3 * cache_module.MAX_OPEN):
        (tmp_path / f"{number:04d}.journal").write_bytes(pack(record(number)))
    cache = TextCache(tmp_path, "reader")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in [*range(3 * cache_module.MAX_OPEN), 0]:
        assert cache.get(record(number)["key"]) == record(number)
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= cache_module.MAX_OPEN
    cache.close()
