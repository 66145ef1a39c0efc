"""From the scores of many users to metrics, in a separate process: CPU seconds and peak memory.

Three language models' scores are made up, the same for all; popularity, recency and chance are ranked beside them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import Row, in_child, peak_bytes, timed
from benchmarks.logs import NUM_USERS, MadeLog
from trsr_dist.config import Config, load_config
from trsr_dist.data.prepare import prepare
from trsr_dist.data.store import HistoryStore
from trsr_dist.evaluate.evaluation import Evaluation
from trsr_dist.evaluate.passes import split_parts
from trsr_dist.evaluate.reduce import Reduction
from trsr_dist.evaluate.score_files import ScoreFolder, UserScores
from trsr_dist.evaluate.users import SplitUsers, StoredSplit
from trsr_dist.run import RunFolder
from trsr_dist.shards.reader import ShardSet
from trsr_dist.summarize.job import summarize

TEST_USERS = 10_000
"""At scale 1; a million is ``--scale 100``."""
MILLION = 1_000_000
SETTINGS = """\
data: {format: table, path: FOLDER, items_file: items.jsonl, split: [1, 0, 999]}
summarize: {scheme: none, engine: extractive}
evaluate: {baselines: [popularity, recency, base], negatives_per_positive: 20, bootstrap_samples: 1000}
"""


def run(scale: float) -> list[Row]:
    """The table; ``scale`` multiplies the users."""
    with tempfile.TemporaryDirectory() as folder:
        num_users = make_scores(Path(folder), round(TEST_USERS * scale))
        seconds, num_bytes, num_systems = in_child(measure, Path(folder))
    case = f"{num_users:,} test users of 21 candidates, {num_systems} systems, 1,000 resamples"
    return [
        Row("reduce", case, "CPU", seconds, "CPU-s"),
        Row("reduce", case, "of a million users at this rate", seconds * MILLION / num_users / 60, "CPU-min"),
        Row("reduce", case, "peak memory", num_bytes / 1e6, "MB"),
    ]


def make_scores(folder: Path, num_users: int) -> int:
    """An evaluation there whose passes are all scored; returns the number of its users."""
    MadeLog(num_users / NUM_USERS).write_interactions(folder, ".parquet")
    (folder / "config.yaml").write_text(SETTINGS.replace("FOLDER", str(folder)))
    config = settings(folder)
    for stage in (prepare, summarize):
        if status := stage(config):
            raise SystemExit(status)
    job, users = evaluation(config), split_users(config)
    first, *others = (job.scores(entry).folder for entry in job.passes)
    write_pass(ScoreFolder(first), users)
    for folder in others:
        shutil.copytree(first, folder, copy_function=os.link)
    return len(users)


def write_pass(scores: ScoreFolder, users: SplitUsers) -> None:
    """Scores of a pass, as the ranks write them."""
    stream = np.random.default_rng(0)
    for number, part in enumerate(split_parts(len(users))):
        outlines = [users.outline(index) for index in part]
        scored = [
            UserScores(
                outline.user, tuple(outline.items), np.array(outline.labels), stream.normal(size=len(outline.items))
            )
            for outline in outlines
        ]
        scores.write(number, scored)


def measure(folder: Path) -> tuple[float, int, int]:
    """Reduce what is there: CPU seconds, bytes at the peak, ranked systems."""
    config = settings(folder)
    with timed() as timer:
        job, store = evaluation(config), HistoryStore(RunFolder(Path(config.run.dir)).histories, check=False)
        folders = {entry.name: job.scores(entry) for entry in job.passes}
        reduced = Reduction(job, split_users(config), StoredSplit(store, job.split), store, folders).run({}, None)
    return timer.cpu, peak_bytes(), len(reduced.systems.outcomes)


def settings(folder: Path) -> Config:
    """The config of the made evaluation."""
    return load_config(folder / "config.yaml", [f"run.dir={folder}/run"])


def evaluation(config: Config) -> Evaluation:
    """Of a model that is nowhere: its scores are there."""
    run = RunFolder(Path(config.run.dir))
    return Evaluation(config, run, "", run.evaluation)


def split_users(config: Config) -> SplitUsers:
    """The test users, on the shards' own candidates."""
    return SplitUsers(ShardSet(RunFolder(Path(config.run.dir)).split("test")), 0, config.run.seed, {})
