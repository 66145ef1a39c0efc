"""The preparation job: raw files in, RUN/histories out."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from trsr_dist.config import Config, dump_config
from trsr_dist.config.sections import DataSection
from trsr_dist.data.amazon_m2 import AmazonReader
from trsr_dist.data.assembly import CandidateMaker, CandidateRules, choose_users, write_items, write_split
from trsr_dist.data.demo import DEMO_FILES, write_demo
from trsr_dist.data.histories import HistoryRules, Spool, spool_items, spool_more_targets, spool_users
from trsr_dist.data.items import CatalogueRules
from trsr_dist.data.jsonl import LAYOUTS, JsonlReader
from trsr_dist.data.mind import MindReader
from trsr_dist.data.retrieved import RetrievedLists
from trsr_dist.data.source import Counts, LineReader, Reader, find_raw, listed, open_raw
from trsr_dist.data.store import ITEMS, POOLS, ArrowRows, check_files, checksums
from trsr_dist.data.tables import find_table, unpacked_name
from trsr_dist.errors import ConfigError, DataError
from trsr_dist.files import atomic_file, atomic_folder, recover_folder, sha256_of, writing
from trsr_dist.hashing import digest
from trsr_dist.locks import folder_lock
from trsr_dist.log import get_logger, setup_logging, show
from trsr_dist.run import SPLITS, RunFolder, is_finished, write_manifest
from trsr_dist.stores import facts_of, is_address, names_in, parts_of

ITEM_SPOOL, USER_SPOOL, TARGET_SPOOL = "items.spool", "users.spool", "targets.spool"
NEWER = ("columns", "interactions_file", "candidates_file")
LARGE_SHARE = 0.05
"""Of unknown items: from here on they are called the cause of an error."""

log = get_logger("data")


def prepare(config: Config, *, force: bool = False, dry_run: bool = False) -> int:
    """Run the stage; see tools/prepare_data.py.

    Raises:
        DataError: the raw files are missing or wrong.
        RunError: the output folder is locked or holds another run's files.
    """
    setup_logging(stage="prepare")
    check_data_settings(config)
    run = RunFolder(Path(config.run.dir))
    counts = Counts()
    lines = LineReader(config.data.encoding_errors, counts)
    reader = build_reader(config, run.raw, lines)
    fields = item_fields(config, reader)
    if dry_run:
        show(dump_config(config) + _plan(config, run, reader))
        return 0
    with writing(run.root), folder_lock(run.histories) as lock:
        recover_folder(run.raw, lock.lease.former)
        if config.data.format == "demo":
            _make_demo(config, run, force)
        elif is_address(config.data.path):
            _fetch(config, run, force)
            reader = build_reader(config, run.raw, lines)
        lists = lists_reader(config, run.raw, lines)
        settings, inputs = _settings(config), _inputs(reader, lists)
        if is_finished(run.histories, settings, inputs, force):
            check_files(run.histories)
            run.write_config("prepare", dump_config(config), only_missing=True)
            log.info("%s: already prepared with these settings; nothing to do (--force redoes it)", run.histories)
            return 0
        with atomic_folder(run.histories, lock.check) as folder:
            facts = _build(config, reader, lists, fields, folder, counts)
            write_manifest(folder, "prepare", settings, inputs, counts=dict(sorted(counts.items())), **facts)
        run.write_config("prepare", dump_config(config))
    _report(run.histories, facts, counts)
    return 0


def _build(
    config: Config,
    reader: Reader,
    lists: JsonlReader | None,
    fields: tuple[str, ...],
    folder: Path,
    counts: Counts,
) -> dict[str, object]:
    """Fill ``folder`` and return what the manifest tells of it."""
    data = config.data
    catalogue = CatalogueRules(reader.item_file, fields, data.empty_items, data.duplicate_items, counts)
    rules = HistoryRules(
        data.min_history, data.max_history, data.long_histories, data.repeated_target, data.unknown_items
    )
    items_path, users_path = folder / ITEM_SPOOL, folder / USER_SPOOL
    spool_items(items_path, reader, catalogue)
    spool_users(users_path, reader.logs(), catalogue.rows, rules, counts)
    retrieved = None
    if lists is not None:
        policies = data.unknown_items, data.missed_targets
        retrieved = RetrievedLists(lists.log_file, lists.candidates(), catalogue.rows, *policies, counts)
    catalogue.rows.clear()
    unknown, share = "", 0.0
    if missing := counts["clicks_on_unknown_items"]:
        share = missing / (read := counts["item_ids_read"])
        what = f"{missing} of {read} item ids ({share:.1%}) are not in {reader.item_file.name}"
        unknown = f"{reader.log_file}: {what}"
        log.warning("%s; they are left out (data.unknown_items=skip)", unknown)
    try:
        return _assemble(config, reader, retrieved, folder, counts)
    except DataError as error:
        if share < LARGE_SHARE:
            raise
        raise DataError(f"{unknown}, so little is left: {error}") from None
    finally:
        items_path.unlink()
        users_path.unlink()
        (folder / TARGET_SPOOL).unlink(missing_ok=True)


def _assemble(
    config: Config, reader: Reader, retrieved: RetrievedLists | None, folder: Path, counts: Counts
) -> dict[str, object]:
    """From the spooled items and users to the files of the store."""
    data = config.data
    items, spool = ArrowRows(folder / ITEM_SPOOL), Spool(folder / USER_SPOOL)
    if not len(spool):
        raise DataError(f"{reader.log_file}: no user is left ({describe(counts)}); widen data.min_history and the like")
    users = choose_users(spool, data.split, data.split_by, data.max_users)
    counts["users_above_max_users"] += len(spool) - len(users.rows)
    train = users.mask(len(spool), "train")
    if data.train_targets > 1:
        path = folder / TARGET_SPOOL
        spool = spool_more_targets(path, spool, train, data.train_targets, data.min_history)
    popularity = sum(spool.count(column, train, len(items)) for column in ("history", "targets"))
    first_seen = spool.first_seen(users.mask(len(spool), *SPLITS), len(items))
    known = np.where(first_seen == np.iinfo(np.int64).max, 0, np.maximum(first_seen, 0))
    write_items(folder / ITEMS, items, popularity, known)
    rules = CandidateRules(
        strategy=data.candidates,
        within_category=data.candidates == "category" or holds_locales(data),
        seen_before_target=data.seen_before_target,
        too_few_negatives=data.too_few_negatives,
        pool_size=config.train.pool_size,
        train_negatives=config.train.negatives_per_positive,
        evaluation_negatives=config.evaluate.negatives_per_positive,
        seed=config.run.seed,
    )
    maker = CandidateMaker(rules, spool, users, items, first_seen, retrieved)
    splits = {split: write_split(folder, split, users, spool, maker, data.max_history, counts) for split in SPLITS}
    return {"num_items": len(items), "splits": splits, "files": checksums(folder)}


def _settings(config: Config) -> dict[str, object]:
    """All that the output depends on beside the raw files; where those lie does not matter."""
    settings = config.data.model_dump(mode="json", exclude={"path", "domain"})
    for name in NEWER:  # histories of before stay those of the same settings
        if not settings[name]:
            del settings[name]
    if not config.data.candidates_file:
        del settings["missed_targets"]
    settings["seed"] = config.run.seed
    if holds_locales(config.data):
        settings[POOLS] = "locale"
    settings["pool_size"] = config.train.pool_size
    settings["train_negatives_per_positive"] = config.train.negatives_per_positive
    settings["evaluation_negatives_per_positive"] = config.evaluate.negatives_per_positive
    return settings


def _inputs(reader: Reader, lists: JsonlReader | None) -> dict[str, str]:
    """Hashes of the raw files, by name."""
    files = {"items": reader.item_file, "log": reader.log_file} | ({"lists": lists.log_file} if lists else {})
    for path in files.values():
        open_raw(path).close()
    same = reader.item_file.name == reader.log_file.name
    return {f"{kind}: {path.name}" if same else path.name: sha256_of(path) for kind, path in files.items()}


def _make_demo(config: Config, run: RunFolder, force: bool) -> None:
    settings = {**config.demo.model_dump(), "seed": config.run.seed}
    if is_finished(run.raw, settings, {}, force):
        return
    with atomic_folder(run.raw) as folder:
        write_demo(folder, config.demo.num_users, config.demo.num_items, config.run.seed)
        write_manifest(folder, "demo", settings, {})
    log.info(
        "demo: wrote %d users and %d news to %s (%s)",
        config.demo.num_users, config.demo.num_items, run.raw, ", ".join(DEMO_FILES),
    )  # fmt: skip


def _fetch(config: Config, run: RunFolder, force: bool) -> None:
    """Copy the raw files of a store to RUN/raw: both or none."""
    url = config.data.path.rstrip("/")
    facts = {name: facts_of(f"{url}/{name}") for name in _names_in(config, url)}
    inputs = {name: digest([size, version]) for name, (size, version) in facts.items()}
    if is_finished(run.raw, {"path": url}, inputs, force):
        return
    with atomic_folder(run.raw) as folder:
        for name, (size, _) in facts.items():
            log.info("%s/%s: copying %d bytes to %s", url, name, size, run.raw)
            with atomic_file(folder / name, "wb") as stream:
                stream.writelines(parts_of(f"{url}/{name}", size))
        write_manifest(folder, "fetch", {"path": url}, inputs)


def _names_in(config: Config, url: str) -> list[str]:
    """Names of the item file and the log of a store's folder, chosen as in one of this machine.

    Raises:
        DataError: one is missing, or left open where the store does not list its files.
    """
    found = names_in(url)
    with TemporaryDirectory() as folder:
        for name in found:
            Path(folder, name).touch()
        reader, lists = (
            make(config, Path(folder), LineReader("fail", Counts())) for make in (build_reader, lists_reader)
        )
    names = sorted({reader.item_file.name, reader.log_file.name} | ({lists.log_file.name} if lists else set()))
    if missing := [name for name in names if "*" in name or (found and name not in found)]:
        raise DataError(
            f"{url}/{missing[0]}: missing (found there: {listed(found) or 'nothing that is listed'}); correct "
            "data.path, or name the files with data.items_file, data.interactions_file and the like"
        )
    return names


def raw_folder(data: DataSection, raw: Path) -> Path:
    """Where the raw files lie; those of the demo and of a store in ``raw``."""
    return raw if data.format == "demo" or is_address(data.path) else Path(data.path)


def lists_reader(config: Config, raw: Path, lines: LineReader) -> JsonlReader | None:
    """The reader of the retriever's candidates; None where they are drawn."""
    data = config.data
    if not data.candidates_file:
        return None
    path = find_raw(raw_folder(data, raw), data.candidates_file)
    columns = {**(LAYOUTS[data.format].columns if data.format in LAYOUTS else {}), **data.columns}
    return JsonlReader(path, path, lines, columns=columns)


def build_reader(config: Config, raw: Path, lines: LineReader) -> Reader:
    """The reader of the raw files; ``raw`` as of ``raw_folder``."""
    data = config.data
    folder = raw_folder(data, raw)
    if data.format == "demo":
        return MindReader(folder / DEMO_FILES[0], folder / DEMO_FILES[1], data.target, lines)
    if data.format == "mind":
        news = find_raw(folder, data.items_file or "news.tsv")
        return MindReader(news, find_raw(folder, data.behaviors_file), data.target, lines)
    if data.format == "amazon_m2":
        products = find_raw(folder, data.items_file or "products_train.csv")
        return AmazonReader(products, find_raw(folder, data.sessions_file), data.locale, lines)
    layout = LAYOUTS[data.format]
    items = find_table(folder, data.items_file or layout.items)
    reviews = unpacked_name(items).removeprefix("meta_")
    log = find_table(folder, data.interactions_file or layout.interactions or reviews)
    columns = {**layout.columns, **data.columns}
    return JsonlReader(items, log, lines, data.item_fields, data.time_format, layout.fields, columns=columns)


def holds_locales(data: DataSection) -> bool:
    """Whether the catalogue holds several locales, an item's category being its own: a user's negatives then come from
    the user's locale, or language alone would tell them from the positives."""
    return data.format == "amazon_m2" and not data.locale


def item_fields(config: Config, reader: Reader) -> tuple[str, ...]:
    """Fields of an item's text.

    Raises:
        ConfigError: data.item_fields names one that the format does not have.
    """
    chosen = config.data.item_fields
    unknown = [name for name in chosen if reader.allowed_fields and name not in reader.allowed_fields]
    if unknown:
        raise ConfigError(
            f"data.item_fields: {unknown[0]!r} is not a field of data.format={config.data.format}; "
            f"it has {', '.join(reader.allowed_fields)}"
        )
    return chosen or reader.default_fields


def check_data_settings(config: Config) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: names the settings.
    """
    data = config.data
    if min(data.split) < 0 or not data.split[0]:
        raise ConfigError(f"data.split={list(data.split)}: shares are not negative, and train's is at least 1")
    if data.target == "impression" and data.format not in ("mind", "demo"):
        raise ConfigError(f"data.target=impression is for MIND's impressions; data.format={data.format} has none")
    if data.candidates == "impressions" and data.format in ("mind", "demo") and data.target != "impression":
        raise ConfigError(
            "data.candidates=impressions needs data.target=impression: what was shown with the last click is not in "
            "MIND's files"
        )
    if data.format not in LAYOUTS:
        for name in ("time_format", "columns", "interactions_file"):
            if getattr(data, name):
                raise ConfigError(f"data.{name} is for data.format={', '.join(LAYOUTS)}; {data.format} has one form")
    try:
        if data.time_format:
            datetime.strptime(datetime(2001, 2, 3, 16, 5, 6).strftime(data.time_format), data.time_format)
    except ValueError as error:
        raise ConfigError(
            f"data.time_format={data.time_format!r}: {error}; expected such as '%d.%m.%Y %H:%M' (Python's strptime)"
        ) from None
    if data.candidates == "impressions" and data.format == "amazon_m2":
        raise ConfigError("data.candidates=impressions: Amazon-M2 has no impressions; choose another strategy")


def _plan(config: Config, run: RunFolder, reader: Reader) -> str:
    """What the stage would read and write."""
    lines = ["# plan"]
    lists = lists_reader(config, run.raw, LineReader("fail", Counts()))
    for path in (reader.item_file, reader.log_file, *([lists.log_file] if lists else [])):
        if config.data.format == "demo":
            lines.append(f"# write and read {path}")
        elif is_address(config.data.path):
            lines.append(f"# copy from {config.data.path}, unless it is there, and read {path}")
        else:
            size = f"{os.path.getsize(path):,} bytes" if os.path.isfile(path) else "MISSING"
            lines.append(f"# read {path} ({size})")
    state = "exists" if (run.histories / "manifest.json").is_file() else "new"
    lines.append(f"# write {run.histories} ({state})")
    return "\n".join(lines)


def describe(counts: Counts) -> str:
    """The counts in one line, without zeros."""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(counts.items()) if count)


def _report(folder: Path, facts: dict, counts: Counts) -> None:
    sizes = {split: facts["splits"][split]["users"] for split in SPLITS}
    users = " / ".join(f"{split} {size}" for split, size in sizes.items())
    log.info("%s: %d items, users %s; %s", folder, facts["num_items"], users, describe(counts))
    for split, size in sizes.items():
        if not size:
            log.warning("the %s split has no user; give more users, or other shares in data.split", split)
