"""Made logs: the same bytes again, and the same users in every form."""

from pathlib import Path

from benchmarks.logs import MadeLog
from tests.data.raw import make_config
from tests.data.test_prepare import users_of
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore

SHARE = 0.0002


def written(folder: Path, ending: str) -> dict[str, bytes]:
    raw = folder / "raw_files"
    raw.mkdir(parents=True)
    log = MadeLog(SHARE)
    if ending:
        assert log.write_interactions(raw, ending) == log.lengths.sum()
    else:
        log.write_mind(raw)
    return {path.name: path.read_bytes() for path in raw.iterdir()}


def test_made_logs_in_every_form(tmp_path: Path) -> None:
    found = []
    for data_format, ending, *names in (
        ("mind", ""),
        ("jsonl", ".jsonl"),
        ("table", ".parquet", "data.items_file=items.jsonl"),
    ):
        folder = tmp_path / data_format
        assert written(folder, ending) == written(folder / "again", ending)
        assert prepare(make_config(folder, data_format, *names)) == 0
        users = users_of(HistoryStore(folder / "run" / "histories"))
        found.append({user: (split, row.history, row.candidates) for user, (split, row) in users.items()})
    assert len(found[0]) == MadeLog(SHARE).num_users == 142
    assert found[0] == found[1] == found[2]
