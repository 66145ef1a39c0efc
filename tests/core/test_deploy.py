"""The manifests for clusters without Slurm: of the schedulers' form, and naming what is here."""

from __future__ import annotations

import re
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
