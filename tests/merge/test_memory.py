"""Memory of the merge does not grow with the model."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import LLAMA2_7B
from benchmarks.merge import write_adapter, write_base
from tests.tokenizers import byte_level

SMALL = LLAMA2_7B | {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 4}

MERGE = """
import json, sys
from pathlib import Path
from trsr_dist.environment import prepare_process
prepare_process(1)
from benchmarks.common import peak_bytes as peak
from trsr_dist.merge import inputs, job
from trsr_dist.merge.source import base_of, find_source
from trsr_dist.bases import base_folder
from trsr_dist.model.artifacts import base_fingerprint

source = find_source(Path(sys.argv[1]))
adapter = source.read()
name = base_of(source, adapter, None)
options = inputs.MergeOptions(head=sys.argv[3], verify="weights")
base = base_folder(name, source.run, "")
prepared = inputs.prepare(source, adapter, name, base, base_fingerprint(base), options)
before = peak()
job.merge(Path(sys.argv[1]), Path(sys.argv[2]), options)
largest = max(output.num_bytes for output in prepared.plan.outputs)
print(json.dumps({"grown": peak() - before, "peak": peak(), "largest": largest, "adapter": adapter.num_bytes}))
"""


def merge_under_limit(folder: Path, sizes: dict[str, int], limit: int, head: str = "causal") -> dict[str, int]:
    """Merge in a process whose whole address space is limited; figures in bytes."""
    adapter = write_adapter(folder / "adapter", write_base(folder / "base", sizes))
    if head == "classifier":
        byte_level(chat=True).save_pretrained(folder / "base")
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(adapter), str(folder / "merged"), head],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("head", ["causal", "classifier"])
def test_memory_is_bounded_by_the_largest_tensor(head: str, tmp_path: Path) -> None:
    figures = merge_under_limit(tmp_path, SMALL, 4 * 2**30, head)
    assert figures["grown"] <= 2 * figures["largest"] + figures["adapter"], figures


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_seven_billion_parameters_within_four_gibibytes(tmp_path: Path) -> None:
    figures = merge_under_limit(tmp_path, LLAMA2_7B, 4 * 2**30)
    assert figures["grown"] <= 2 * figures["largest"] + figures["adapter"], figures
