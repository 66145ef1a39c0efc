"""The preflight names the node that is at fault; on the lab, a job goes on without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.slurm.lab import REPOSITORY, Lab
from trsr_dist import preflight
from trsr_dist.environment import Ranks
from trsr_dist.errors import RunError
from trsr_dist.preflight import (
    Fault,
    NodeReport,
    code_hash,
    collect,
    find_faults,
    inspect_node,
    publish,
    wait_for_folder,
)

GOOD = NodeReport(0, "a", "c0de", "torch 2", 8, "driver 550", 100.0, 100.0)


def test_equal_nodes_have_no_fault() -> None:
    assert find_faults([GOOD, replace(GOOD, rank=1, host="b")], 2, ["a", "b"]) == []


@pytest.mark.parametrize("change", [{"code": "0ther"}, {"packages": "torch 1"}, {"gpus": 7}, {"driver": "driver 535"}])
def test_the_odd_node_is_named(change: dict[str, object]) -> None:
    reports = [replace(GOOD, rank=rank, host=host) for rank, host in enumerate("abc")]
    reports[1] = replace(reports[1], **change)
    faults = find_faults(reports, 3, list("abc"))
    assert [fault.host for fault in faults] == ["b"]
    assert next(iter(change)) in faults[0].text


def test_silent_nodes_and_own_faults_are_named() -> None:
    full = replace(GOOD, faults=["scratch: 0.1 GB free, 5 needed"])
    faults = find_faults([full], 3, ["a", "b"])
    assert {fault.host for fault in faults} == {"a", "b"}
    assert find_faults([GOOD], 2, ["a"]) == [Fault("", "no report of ranks [1]: their tasks did not start")]


def test_a_node_goes_by_slurms_name_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node001")
    report = inspect_node(Ranks(host="node001.cluster.local"), tmp_path, tmp_path, 0)
    assert find_faults([report], 1, ["node001"]) == []


@pytest.mark.parametrize(("seen", "given", "gpus"), [(8, None, 8), (8, 4, 4), (7, 8, 7)])
def test_gpus_are_those_of_the_job(
    seen: int, given: int | None, gpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number in range(seen):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
    (tmp_path / "version").write_text("driver 550\nits compiler\n")
    monkeypatch.setattr(preflight, "DRIVER", tmp_path)
    monkeypatch.setattr(preflight, "slurm_gpus", lambda: given)
    report = inspect_node(Ranks(0, 8, 0, 8), tmp_path, tmp_path, 0)
    assert (report.gpus, report.driver) == (gpus, "driver 550")
    assert report.faults == (["8 tasks for 7 GPUs; start one task per GPU"] if seen == 7 else [])


def test_code_hash_sees_every_source(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "one.py").write_text("x = 1\n")
    before = code_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("no code")
    assert code_hash(tmp_path) == before
    (tmp_path / "inner" / "one.py").write_text("x = 2\n")
    assert code_hash(tmp_path) != before


def test_reports_are_collected_as_far_as_they_come(tmp_path: Path) -> None:
    publish(tmp_path / "reports", 1, {"host": "b"})
    publish(tmp_path / "reports", 0, {"host": "a"})
    assert collect(tmp_path / "reports", 3, 0.2) == [{"host": "a"}, {"host": "b"}]


def test_a_node_without_the_shared_disk_makes_no_local_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="node7: cannot write in"):
        wait_for_folder(tmp_path / "missing" / "reports", "node7", 0.1)
    assert not (tmp_path / "missing").exists()


@pytest.fixture
def node2(lab: Lab) -> Iterator[Lab]:
    """The lab, whose second node's mounts are undone afterwards."""
    lab.wait_for_nodes(3)
    yield lab
    lab.wait_for_nodes(3)
    lab.run("while read -r path; do umount -l $path; done < /tmp/.node2-mounts; rm -f /tmp/.node2-mounts", on="node2")


def submit(lab: Lab, folder: Path, options: str, **env: str) -> str:
    script = f"sbatch --parsable --output={folder}/out {options} tests/slurm/counter.sbatch configs/quickstart.yaml"
    return lab.run(f"{script} run.dir={folder}/run", env={"STEPS": "3", "WITH_PREFLIGHT": "1", **env}).strip()


@pytest.mark.slurm
def test_healthy_nodes_pass_with_their_bandwidth(lab: Lab, tmp_path: Path) -> None:
    job = submit(lab, tmp_path, "-N3 --ntasks-per-node=1")
    assert lab.wait_for_job(job) == "COMPLETED", (tmp_path / "out").read_text()
    assert "3 ranks on 3 nodes are ready" in (tmp_path / "out").read_text()
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("run/logs/*/preflight-0/rank-*.json")]
    assert {report["host"] for report in reports} == {"node1", "node2", "node3"}


@pytest.mark.slurm
def test_node_without_the_run_folder_is_left_out(node2: Lab, tmp_path: Path) -> None:
    node2.run(f"mount -t tmpfs tmpfs {tmp_path} && echo {tmp_path} > /tmp/.node2-mounts", on="node2")
    job = submit(node2, tmp_path, "-N2 --ntasks-per-node=1", TRSR_EXCLUDE_BAD_NODES="1")
    assert node2.wait_for_job(job) == "COMPLETED", (tmp_path / "out").read_text()
    assert "bad nodes node2" in (tmp_path / "out").read_text()
    assert node2.job(job)["NodeList"] == "node[1,3]"


@pytest.mark.slurm
def test_node_with_other_code_is_named(node2: Lab, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("")
    source = REPOSITORY / "trsr_dist" / "rows.py"
    node2.run(f"mount --bind {tmp_path}/other.py {source} && echo {source} > /tmp/.node2-mounts", on="node2")
    job = submit(node2, tmp_path, "-N3 --ntasks-per-node=1")
    assert node2.wait_for_job(job) == "FAILED"
    assert "preflight: node2: code:" in (tmp_path / "out").read_text()
    assert node2.job(job)["Restarts"] == "0"
