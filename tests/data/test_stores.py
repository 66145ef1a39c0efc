"""Raw files in a store give the histories of a folder, to the last byte."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from werkzeug.wrappers import Response

from tests.data.raw import clicks, make_config
from tests.data.test_tables import COLUMNS, USERS, write_tables
from tests.stores import Store, running_store
from trsr_dist import stores
from trsr_dist.config import Config, load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.errors import ConfigError, DataError, RunError

NAMES = ["data.items_file=items.csv", "data.interactions_file=interactions.csv"]
LISTS = "data.candidates_file=lists.csv"


@pytest.fixture(params=["http", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Holds a folder of CSV files."""
    monkeypatch.setattr(stores, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(stores, "TRY_SECONDS", 3.0)
    monkeypatch.setattr(stores, "PART_BYTES", 1000)
    with running_store(request.param, tmp_path / "served") as store:
        raw = write_tables(tmp_path, ".csv")
        rows = [f"u{user},{item}\n" for user in range(USERS) for item in ("N1", "N2", "N3", "N4", clicks(user)[-1])]
        (raw / "lists.csv").write_text("".join(["customer,sku\n", *dict.fromkeys(rows)]))
        for path in raw.iterdir():
            store.put(path, f"raw/{path.name}")
        yield store


def config_of(store: Store, folder: Path, *settings: str) -> Config:
    """Web servers list no files."""
    folder.mkdir(exist_ok=True)
    names = NAMES if store.kind == "http" else []
    return make_config(folder, "table", COLUMNS, f"data.path={store.url('raw')}", *names, *settings)


def histories(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "run" / "histories").iterdir() if path.is_file()}


def test_histories_are_those_of_a_folder(store: Store, tmp_path: Path) -> None:
    config = config_of(store, tmp_path / "other", LISTS)
    prepare(config)
    prepare(make_config(tmp_path, "table", COLUMNS, LISTS, *(NAMES if store.kind == "http" else [])))
    assert histories(tmp_path / "other") == histories(tmp_path) and len(histories(tmp_path)) == 5
    raw = tmp_path / "other" / "run" / "raw"
    first = raw.stat().st_ino
    prepare(config)
    assert raw.stat().st_ino == first, "not copied again"
    (tmp_path / "items.csv").write_text("sku,title,kind\nN1,Thing,c\n")
    store.put(tmp_path / "items.csv", "raw/items.csv")
    with pytest.raises(RunError, match=r"raw: made with input items\.csv=.*--force to make it again"):
        prepare(config)


def test_raw_files_are_there_whole_or_not_at_all(store: Store, tmp_path: Path) -> None:
    config = config_of(store, tmp_path / "other")
    reads: list[str] = []

    def dies(path: str) -> Response | None:
        reads.append(path)
        return Response(status=444) if len(reads) > 5 else None

    store.fault = dies
    with pytest.raises(RunError, match=r"\.csv: .*, 3 times; check the network and the store"):
        prepare(config)
    assert not (tmp_path / "other" / "run" / "raw").exists()
    store.fault = lambda path: None
    assert prepare(config) == 0


def test_what_is_missing_is_named(store: Store, tmp_path: Path) -> None:
    config = config_of(store, tmp_path / "other", "data.items_file=things.csv")
    words = (
        r"correct the address" if store.kind == "http" else r"found there: interactions\.csv, items\.csv, lists\.csv"
    )
    with pytest.raises((DataError, RunError), match=rf"raw/things\.csv: .*{words}"):
        prepare(config)


def test_names_left_open_need_a_store_that_lists_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"interactions\.\*: missing \(found there: nothing that is listed\).*items_file"
    ):
        prepare(make_config(tmp_path, "table", "data.path=https://logs.example/raw"))


@pytest.mark.parametrize("key", ["data.path", "train.shards_url"])
def test_addresses_hold_no_secret(tmp_path: Path, key: str) -> None:
    for address in ("https://me:sesame@logs.example/raw", "https://logs.example/raw?sig=sesame"):
        with pytest.raises(ConfigError, match="no user, password or query may stand in an address") as error:
            load_config("configs/jsonl.yaml", [f"{key}={address}"])
        assert "sesame" not in str(error.value)
    load_config(
        "configs/jsonl.yaml", [f"{key}=hf://datasets/me/logs@main/raw", "data.path=x"][: 1 + (key != "data.path")]
    )
