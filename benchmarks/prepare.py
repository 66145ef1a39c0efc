"""Preparing made logs in the shape of MINDlarge, each in its own process: CPU seconds and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Row, peak_bytes, timed
from benchmarks.logs import MadeLog
from trsr_dist.config import load_config
from trsr_dist.data.prepare import prepare

SHARE = 0.05
"""Of MINDlarge, at scale 1; the whole is ``--scale 20``."""
# A new interpreter: in the children of ``in_child`` torch is loaded, whose memory preparing does not need.
CHILD = "import sys; from benchmarks.prepare import measure; measure(*sys.argv[1:])"


def run(scale: float) -> list[Row]:
    """The table; ``scale`` multiplies the users."""
    rows = []
    log = MadeLog(SHARE * scale)
    for data_format, ending in (("mind", ""), ("jsonl", ".jsonl"), ("table", ".parquet")):
        with tempfile.TemporaryDirectory() as folder:
            if ending:
                num_clicks = log.write_interactions(Path(folder), ending)
            else:
                log.write_mind(Path(folder))
                num_clicks = int(log.lengths.sum())
            size = sum(path.stat().st_size for path in Path(folder).iterdir())
            command = [sys.executable, "-c", CHILD, data_format, folder]
            done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        case = f"{data_format}: {log.num_users:,} users, {num_clicks:,} clicks, {size / 1e6:,.0f} MB"
        rows += [
            Row("prepare", case, "CPU", found["cpu"], "CPU-s"),
            Row("prepare", case, "clicks", num_clicks / found["cpu"], "clicks/CPU-s"),
            Row("prepare", case, "peak memory", found["bytes"] / 1e6, "MB"),
        ]
    return rows


def measure(data_format: str, folder: str) -> None:
    """Prepare the files of a folder, there; the last line says in CPU seconds and bytes what that took."""
    items = ["data.items_file=items.jsonl"] if data_format == "table" else []
    (Path(folder) / "config.yaml").write_text(f"data:\n  format: {data_format}\n  path: {folder}\n")
    config = load_config(Path(folder) / "config.yaml", [f"run.dir={folder}/run", *items])
    with timed() as timer:
        prepare(config)
    print(json.dumps({"cpu": timer.cpu, "bytes": peak_bytes()}))
