"""The manifests for clusters without Slurm: of the schedulers' form, and naming what is here."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.spawn import ROOT
from trsr_dist.config import load_config

KUBERNETES = ROOT / "deploy" / "kubernetes.yaml"
SKYPILOT = ROOT / "deploy" / "skypilot.yaml"


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(KUBERNETES.read_text()))


def test_kubernetes_takes_every_document() -> None:
    for document in documents():
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_training_has_a_pod_for_each_node() -> None:
    by_name = {(document["kind"], document["metadata"]["name"]): document for document in documents()}
    job = by_name["Job", "trsr-train"]["spec"]
    nodes = int(by_name["ConfigMap", "trsr"]["data"]["NODES"])
    assert job["completions"] == job["parallelism"] == nodes
    assert by_name["Service", "trsr-train"]["spec"]["selector"] == {"job-name": "trsr-train"}
    assert job["template"]["spec"]["subdomain"] == "trsr-train"


@pytest.mark.parametrize("manifest", [KUBERNETES, SKYPILOT], ids=lambda path: path.name)
def test_scripts_and_configs_are_here(manifest: Path) -> None:
    text = manifest.read_text()
    scripts = set(re.findall(r"(?:launch|tools)/\w+\.py", text))
    assert {"launch/summarize.py", "launch/train.py", "tools/evaluate.py"} <= scripts
    assert all((ROOT / script).is_file() for script in scripts)
    for config in set(re.findall(r"configs/\w+\.yaml", text)):
        load_config(ROOT / config)


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("failing", ["prepare_data", "summarize", "train", "merge_lora", ""])
def test_a_stage_that_fails_ends_the_job_on_skypilot(tmp_path: Path, failing: str, rank: str) -> None:
    """SkyPilot gives a task's script to bash without ``set -e``; its status is the last command's."""
    task = yaml.safe_load(SKYPILOT.read_text())
    stub = f'echo "$@" >>{tmp_path}/ran; case "$*" in *{failing or "nothing"}.py*) exit 1 ;; esac'
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{stub}\n")
        (tmp_path / name).chmod(0o755)
    env = {"SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    env |= {**task["envs"], "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, check=False, timeout=20)
    stages = re.findall(r"(\w+)\.py", (tmp_path / "ran").read_text())
    ours = ["prepare_data", "summarize", "train", *(["merge_lora", "evaluate"] if rank == "0" else [])]
    last = ours.index(failing) + 1 if failing in ours else len(ours)
    assert stages == ours[:last], "and all nodes wait for each other within torchrun's ten minutes"
    assert (done.returncode != 0) == (failing in ours)
