"""The preparation job: raw files in, RUN/histories out."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from trsr_dist import __version__
from trsr_dist.config import Config, dump_config
from trsr_dist.config.sections import DataSection
from trsr_dist.data.build import Build, describe, holds_locales
from trsr_dist.data.demo import DEMO_FILES, write_demo
from trsr_dist.data.jsonl import LAYOUTS, JsonlReader
from trsr_dist.data.published import AmazonReader, MindReader
from trsr_dist.data.shared import SharedWork, exclusively
from trsr_dist.data.source import COMPRESSED, Counts, LineReader, Reader, find_raw, listed, open_raw
from trsr_dist.data.store import POOLS, PREFIXES, check_files
from trsr_dist.data.tables import find_table, is_parquet, unpacked_name
from trsr_dist.data.times import parsed_as
from trsr_dist.environment import task_number
from trsr_dist.errors import ConfigError, DataError, RunError, TrsrError
from trsr_dist.files import atomic_file, atomic_folder, recover_folder, remove_folder, sha256_of, writing
from trsr_dist.hashing import digest
from trsr_dist.leases import LeaseFolder
from trsr_dist.liveness import Owner
from trsr_dist.locks import LOCK_STALE_SECONDS, Claim, claim, folder_lock
from trsr_dist.log import get_logger, setup_logging, show
from trsr_dist.run import SPLITS, RunFolder, is_finished, read_manifest, write_manifest
from trsr_dist.stores import facts_of, is_address, names_in, parts_of

SETTINGS_OF = (
    (("mind",), ("behaviors_file",)),
    (("amazon_m2",), ("sessions_file", "locale")),
    (tuple(LAYOUTS), ("time_format", "columns", "interactions_file")),
)
"""Formats, and settings that only these have."""
OMITTED_WHEN_EMPTY = ("columns", "interactions_file", "candidates_file")
WORK = ".histories.work"
"""Beside the histories: what the tasks have made so far, a folder for each raw files and settings."""
PART_BYTES, MOST_PARTS = 1 << 26, 1024
"""Of the log: the users are cut into parts, each of which fits in a fraction of the memory."""
COMPRESSION_RATIO = 8
"""Bytes of JSON lines to one of Parquet or of a compressed file, about."""
LEAVING_SECONDS = 15.0
"""That the other tasks are given to see that all is done."""

log = get_logger("data")


def prepare(config: Config, *, force: bool = False, dry_run: bool = False) -> int:
    """Run this task's share of the stage, see tools/prepare_data.py; returns when the histories are published.

    Raises:
        DataError: the raw files are missing or wrong.
        RunError: a job of other settings is at work here, or the output folder holds another run's files.
    """
    number, num_tasks = task_number()
    setup_logging(number, stage="prepare")
    check_data_settings(config)
    run = RunFolder(Path(config.run.dir))
    counts = Counts()
    reader, lists = _readers(config, run.raw, counts)
    item_fields(config, reader)
    if dry_run:
        show(dump_config(config) + _plan(config, run, _files(reader, lists)))
        return 0
    stage = _Stage(config, run, counts, Asked(force and num_tasks == 1, force), is_first=not number)
    with writing(run.root):
        try:
            _take_part(stage)
        except FileNotFoundError:  # others have published, and removed what was shared as this task joined them
            _take_part(stage)
    return 0


class Asked(NamedTuple):
    """What --force asks of ``is_finished``. Of several tasks none could tell old histories from what another has just
    made."""

    redo: bool
    """Make again what is there."""
    replace: bool
    """What was made with other settings gives way."""


@dataclass(frozen=True, slots=True)
class _Stage:
    config: Config
    run_folder: RunFolder
    counts: Counts
    asked: Asked
    is_first: bool

    def run(self, mine: Claim, leases: LeaseFolder) -> bool:
        """Return whether it was this task that published the histories."""
        config, run = self.config, self.run_folder
        settings = _settings(config)
        with exclusively(leases), folder_lock(run.histories) as lock:
            recover_folder(run.raw, lock.lease.former)
            if config.data.format == "demo":
                _make_demo(config, run, self.asked)
            elif is_address(config.data.path):
                _fetch(config, run, self.asked)
        reader, lists = _readers(config, run.raw, self.counts)  # once more: now the files are there
        files = _files(reader, lists)
        work = self._open_work(mine, leases, settings, files)
        inputs = _inputs(work, files)
        if is_finished(run.histories, settings, inputs, *self.asked):
            check_files(run.histories)
            run.write_config("prepare", dump_config(config), only_missing=True)
            log.info("%s: already prepared with these settings; nothing to do (--force redoes it)", run.histories)
            return False
        build = Build(config, reader, lists, work, _num_parts(reader.log_file), self.is_first)
        is_mine = False
        try:
            build.run(item_fields(config, reader))
            with exclusively(leases):
                if not is_finished(run.histories, settings, inputs, *self.asked):
                    self._publish(build, settings, inputs)
                    is_mine = True
        except (OSError, DataError):  # the pieces are gone where others have published
            if not is_finished(run.histories, settings, inputs, *self.asked):
                raise
        if self.is_first:
            _report(run.histories)
        return is_mine

    def _publish(self, build: Build, settings: dict[str, object], inputs: dict[str, str]) -> None:
        run = self.run_folder
        with folder_lock(run.histories) as lock, atomic_folder(run.histories, lock.check) as folder:
            facts = build.write(folder)
            write_manifest(folder, "prepare", settings, inputs, **facts)
        run.write_config("prepare", dump_config(self.config))

    def _open_work(
        self, mine: Claim, leases: LeaseFolder, settings: dict[str, object], files: dict[str, Path]
    ) -> SharedWork:
        """The folder of these settings and raw files. A task that is alone removes what is of others, and what ended in
        an error, whose cause may be gone."""
        for path in files.values():
            open_raw(path).close()
        facts = {kind: [str(path), path.stat().st_size, path.stat().st_mtime_ns] for kind, path in files.items()}
        key = digest([__version__, settings, facts, _num_parts(files["log"])])
        root, name = leases.folder.parent, f"work-{key[:12]}"
        work = SharedWork(root / name, leases, self.counts)
        if self.asked.redo:
            mine.check_alone()
        with suppress(RunError):
            mine.check_alone()
            for folder in root.glob("work-*"):
                if folder.name != name or self.asked.redo or work.has_failed():
                    remove_folder(folder)
        return work


def _take_part(stage: _Stage) -> None:
    config = stage.config
    root, what = stage.run_folder.histories.with_name(WORK), {**_settings(config), "path": config.data.path}
    with claim(root, digest(what), what) as mine:
        leases = LeaseFolder(root / "leases", Owner.myself(), LOCK_STALE_SECONDS)
        try:
            _tidy(mine, LEAVING_SECONDS if stage.run(mine, leases) else 0.0)
        except TrsrError:
            _tidy(mine)
            raise
        finally:
            leases.close()


def _tidy(mine: Claim, patience_seconds: float = 0.0) -> None:
    """Remove what the tasks have shared; where others are still at it, the last one does."""
    end = time.monotonic() + patience_seconds
    while True:
        try:
            mine.check_alone()
            remove_folder(mine.path.parent.parent)
            return
        except RunError:
            if time.monotonic() >= end:
                return
        except FileNotFoundError:
            return
        time.sleep(0.1)


def _num_parts(path: Path) -> int:
    is_packed = is_parquet(path) or path.suffix in COMPRESSED
    return min(1 + path.stat().st_size * (COMPRESSION_RATIO if is_packed else 1) // PART_BYTES, MOST_PARTS)


def _settings(config: Config) -> dict[str, object]:
    """All that the output depends on beside the raw files; where those lie does not matter."""
    settings = config.data.model_dump(mode="json", exclude={"path", "domain"})
    for name in OMITTED_WHEN_EMPTY:  # histories of before stay those of the same settings
        if not settings[name]:
            del settings[name]
    if not config.data.candidates_file:
        del settings["missed_targets"]
    if config.data.train_prefixes == 1:
        del settings[PREFIXES]
    settings["seed"] = config.run.seed
    if holds_locales(config.data):
        settings[POOLS] = "locale"
    settings["pool_size"] = config.train.pool_size
    settings["train_negatives_per_positive"] = config.train.negatives_per_positive
    settings["evaluation_negatives_per_positive"] = config.evaluate.negatives_per_positive
    return settings


def _readers(config: Config, raw: Path, counts: Counts) -> tuple[Reader, JsonlReader | None]:
    """Of the raw files, and of the retriever's candidates; none where they are drawn. ``raw`` as of ``raw_folder``."""
    lines = LineReader(config.data.encoding_errors, counts)
    return build_reader(config, raw, lines), lists_reader(config, raw, lines)


def _files(reader: Reader, lists: JsonlReader | None) -> dict[str, Path]:
    """The raw files, by what they hold."""
    return {"items": reader.item_file, "log": reader.log_file} | ({"lists": lists.log_file} if lists else {})


def _inputs(work: SharedWork, files: dict[str, Path]) -> dict[str, str]:
    """Hashes of the raw files, by name."""
    paths = [*files.values()]
    work.make("inputs", lambda: enumerate(paths), lambda path, folder: {"hash": sha256_of(path)})
    work.check("inputs")
    same = files["items"].name == files["log"].name
    return {
        f"{kind}: {path.name}" if same else path.name: work.facts("inputs", number)["hash"]
        for number, (kind, path) in enumerate(files.items())
    }


def _make_demo(config: Config, run: RunFolder, asked: Asked) -> None:
    settings = {**config.demo.model_dump(), "seed": config.run.seed}
    if is_finished(run.raw, settings, {}, *asked):
        return
    with atomic_folder(run.raw) as folder:
        write_demo(folder, config.demo.num_users, config.demo.num_items, config.run.seed)
        write_manifest(folder, "demo", settings, {})
    log.info(
        "demo: wrote %d users and %d news to %s (%s)",
        config.demo.num_users, config.demo.num_items, run.raw, ", ".join(DEMO_FILES),
    )  # fmt: skip


def _fetch(config: Config, run: RunFolder, asked: Asked) -> None:
    """Copy the raw files of a store to RUN/raw: both or none."""
    url = config.data.path.rstrip("/")
    facts = {name: facts_of(f"{url}/{name}") for name in _names_in(config, url)}
    inputs = {name: digest([size, version]) for name, (size, version) in facts.items()}
    if is_finished(run.raw, {"path": url}, inputs, *asked):
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
        files = _files(*_readers(config, Path(folder), Counts()))
    names = sorted({path.name for path in files.values()})
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
    if data.target == "impression" and data.format not in ("mind", "demo"):
        raise ConfigError(f"data.target=impression is for MIND's impressions; data.format={data.format} has none")
    if data.candidates == "impressions" and data.format in ("mind", "demo") and data.target != "impression":
        raise ConfigError(
            "data.candidates=impressions needs data.target=impression: what was shown with the last click is not in "
            "MIND's files"
        )
    for formats, names in SETTINGS_OF:
        for name in names if data.format not in formats else ():
            if getattr(data, name) != DataSection.model_fields[name].default:
                raise ConfigError(
                    f"data.{name} is for data.format={', '.join(formats)}, not for {data.format}; remove it"
                )
    try:
        if data.time_format:
            parsed_as(datetime(2001, 2, 3, 16, 5, 6, tzinfo=UTC).strftime(data.time_format), data.time_format)
    except ValueError as error:
        raise ConfigError(
            f"data.time_format={data.time_format!r}: {error}; expected such as '%d.%m.%Y %H:%M' (Python's strptime)"
        ) from None
    if data.candidates == "impressions" and data.format == "amazon_m2":
        raise ConfigError("data.candidates=impressions: Amazon-M2 has no impressions; choose another strategy")


def _plan(config: Config, run: RunFolder, files: dict[str, Path]) -> str:
    """What the stage would read and write."""
    lines = ["# plan"]
    for path in files.values():
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


def _report(folder: Path) -> None:
    facts = read_manifest(folder)
    sizes = {split: facts["splits"][split]["users"] for split in SPLITS}
    told = " / ".join(f"{split} {size}" for split, size in sizes.items())
    what, counts = "samples" if PREFIXES in facts["settings"] else "users", describe(Counts(facts["counts"]))
    log.info("%s: %d items, %s %s; %s", folder, facts["num_items"], what, told, counts)
    for split, size in sizes.items():
        if not size:
            log.warning("the %s split has no user; give more users, or other shares in data.split", split)
