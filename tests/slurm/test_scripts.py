"""What the job scripts decide without Slurm: what is progress, what is finished, when --force holds."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.lab import REPOSITORY, wait_until
from trsr_dist.config import dump_config, load_config

CONFIG = "configs/quickstart.yaml"
PROGRESS = "checkpoints/step-000100/state.json"
NO_PROGRESS = ["logs/train-1/task-0000.log", "config/train.yaml", "shards/.tmp-1/a.tar", ".lock", "heartbeats/rank-0"]
NO_PROGRESS += ["samples/000/summaries/progress/a/0.json", "samples/000/tensorboard/events"]


def bash(script: str, folder: Path = REPOSITORY, **env: str) -> str:
    """Output of a script that has the job scripts' functions."""
    head = "set -euo pipefail\n" + "".join(
        f"source {REPOSITORY}/slurm/{n}.sh\n" for n in ("restart", "watch", "outputs")
    )
    done = subprocess.run(
        ["bash", "-c", head + "say() { echo \"$*\"; }\n" + script],
        cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode in (0, 75), done.stderr
    return done.stdout.strip()


def write(path: Path, text: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("spelled", ["run", "run/", "./run/.", ".hidden/run", "r[5]", "my run", "../{outer}/run"])
def test_progress_is_seen_however_the_run_folder_is_spelled(tmp_path: Path, spelled: str) -> None:
    spelled = spelled.format(outer=tmp_path.name)
    run = tmp_path / spelled
    mark = lambda: bash("progress_mark", tmp_path, run=spelled)  # noqa: E731
    run.mkdir(parents=True)
    before = mark()
    for name in NO_PROGRESS:
        write(run / name)
    assert mark() == before
    write(run / PROGRESS)
    assert mark() != before


def test_a_preparation_makes_progress_piece_by_piece(tmp_path: Path) -> None:
    """A piece counts when it is whole; --force, which would remove it, holds until the histories are there."""
    logs, work = tmp_path / "logs" / "prepare-1", tmp_path / ".histories.work"
    write(tmp_path / "logs" / "prepare-1" / "forced")
    mark = lambda: bash("progress_mark", run=str(tmp_path))  # noqa: E731
    before = mark()
    for name in ("leases/log-1", ".claims/1-a-2", "work-a1/.log-000000.tmp-node1-1-2-3/facts.json"):
        write(work / name)
    assert mark() == before
    write(work / "work-a1" / "log-000000" / "facts.json")
    assert mark() != before
    script = 'settings=(--config C --force)\nwithout_used_force\necho "${settings[*]}"'
    assert bash(script, restart="1", run=str(tmp_path), logs=str(logs)) == "--config C --force"


def test_a_cut_off_count_of_idle_restarts_starts_at_zero(tmp_path: Path) -> None:
    write(tmp_path / "progress", "")
    bash("count_idle_restarts", run=str(tmp_path), logs=str(tmp_path), TRSR_IDLE_RESTARTS="3")
    assert (tmp_path / "progress").read_text().split()[1] == "0"


@pytest.mark.parametrize(
    ("squeue", "said"),
    [
        ("echo RUNNING", "stopped; requeued\nrequeue 7_3"),
        ("[ -e asked ] && echo RUNNING || { touch asked; false; }", "stopped; requeued\nrequeue 7_3"),
        ("echo COMPLETING", "stopped; Slurm itself ends or requeues this job"),
    ],
    ids=["running", "controller away", "ending"],
)
def test_a_silent_controller_does_not_end_a_job(tmp_path: Path, squeue: str, said: str) -> None:
    stubs = f'squeue() {{ {squeue}; }}\nscontrol() {{ echo "$*"; }}\n'
    values = "ended=0 job_id=7_3 EXIT_REQUEUE=75\n"
    assert bash(f"{stubs}{values}run_again stopped", tmp_path, run=str(tmp_path)) == said


@pytest.mark.parametrize(
    ("change", "is_here"),
    [
        ("", True),
        ("idle=1", False),
        ("ended=1", False),
        ("touch STOP", False),
        ("squeue() { false; }", False),
        ("squeue() { echo COMPLETING NONE; }", False),
        ('squeue() { echo RUNNING "$(date -d "+2 minutes" +%FT%T)"; }', False),
        ("timeout() { false; }", False),
    ],
)
def test_a_job_runs_again_on_its_nodes_while_they_and_slurm_let_it(tmp_path: Path, change: str, is_here: bool) -> None:
    script = f"""
        idle=0 ended=0 restart=0 job_id=7 nodes=(a b) arguments=(x "y z")
        squeue() {{ echo RUNNING "$(date -d "+1 hour" +%FT%T)"; }}
        timeout() {{ echo "$*"; }}
        exec() {{ echo "${{@:3}}"; }}
        {change}
        run_here killed
    """
    expected = "30 srun --nodes=2 --ntasks=2 true\nkilled; run again on the same nodes\nx y z"
    said = bash(script, tmp_path, run=str(tmp_path), logs=str(tmp_path))
    assert said == (expected if is_here else "")
    assert (tmp_path / "again-after-0").exists() == is_here


@pytest.mark.parametrize(
    ("others", "missing"),
    [
        ("while sleep 1; do touch 1-node; done", ""),
        ("sleep 60", "1-node"),
        ("SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2 $slurm/ended.sh", ""),
        ("for SLURM_PROCID in 0 1; do SLURM_STEP_NUM_TASKS=2 $slurm/ended.sh; done", "all-ended"),
    ],
    ids=["alive", "gone", "ended", "all ended"],
)
def test_a_task_is_gone_when_its_sign_stands_still(tmp_path: Path, others: str, missing: str) -> None:
    """Beside one that lives."""
    script = f"""
        export SLURM_PROCID TRSR_SIGNS=$PWD TRSR_BEAT_SECONDS=1 TRSR_TASK_SECONDS=6
        for task in 0 1; do touch $task-node; done
        while sleep 1; do touch -c 0-node; done &>/dev/null & alive=$!
        ({others}) &>/dev/null & other=$!
        sleep 0.5
        sleep 9 &>/dev/null & srun=$!
        watch_tasks $srun & watch=$!
        if wait $srun; then echo ended; else echo killed; fi
        kill $alive $other $watch 2>/dev/null || true
    """
    line = "Slurm waits for tasks without a sign of life for 6 s"
    said = bash(script, tmp_path, slurm=str(REPOSITORY / "slurm"))
    assert said == (f"{line}: {missing}\nkilled" if missing else "ended")


def is_left(leader: subprocess.Popen[bytes]) -> bool:
    """Whether a process of this one's group is there."""
    try:
        os.killpg(leader.pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_sign_of_life_lasts_as_long_as_its_task(tmp_path: Path) -> None:
    def start(beat_seconds: float, *command: str) -> subprocess.Popen[bytes]:
        task = ["bash", f"{REPOSITORY}/slurm/task.sh", str(tmp_path), *command]
        env = {"SLURM_PROCID": "1", "TRSR_SIGNS": str(tmp_path), "TRSR_CACHE": str(tmp_path / "cache")}
        env |= os.environ | {"TRSR_BEAT_SECONDS": str(beat_seconds)}
        return subprocess.Popen(task, env=env, start_new_session=True)

    with start(0.2, "sleep", "60") as task:
        wait_until(lambda: list(tmp_path.glob("1-*")), 10, "the task has begun", str)
        (sign,) = tmp_path.glob("1-*")
        before = sign.stat().st_mtime_ns
        wait_until(lambda: sign.stat().st_mtime_ns != before, 10, "the sign changes", str)
        task.kill()
    wait_until(lambda: not is_left(task), 5, "nothing is left of a killed task", str)
    with start(60, "sleep", "0.1") as task:
        assert task.wait() == 0
    wait_until(lambda: not is_left(task), 5, "nothing is left of a task that has ended, long before its next beat", str)


@pytest.mark.parametrize("heeds", [True, False], ids=["by TERM", "by KILL"])
def test_a_task_without_its_slurmstepd_is_ended(tmp_path: Path, heeds: bool) -> None:
    trap = "trap 'touch told; exit' TERM" if heeds else "trap '' TERM"
    command = f"{trap}; while sleep 0.1; do touch lives; done"
    manager = f"bash {REPOSITORY}/slurm/task.sh . bash -c {shlex.quote(command)} & wait"
    env = {"SLURM_PROCID": "1", "TRSR_SIGNS": ".", "TRSR_CACHE": "cache", "TRSR_BEAT_SECONDS": "0.5"}
    lives = tmp_path / "lives"
    with subprocess.Popen(["bash", "-c", manager], cwd=tmp_path, env=os.environ | env, start_new_session=True) as task:
        for _ in range(2):  # while its slurmstepd lives it is let alone
            wait_until(lives.exists, 10, "the task is at work", str)
            time.sleep(1.2)
            lives.unlink()
        wait_until(lives.exists, 10, "the task is at work still", str)
        assert not (tmp_path / "told").exists()
        task.kill()
    wait_until(lambda: not is_left(task), 5, "the task has ended", str)
    assert (tmp_path / "told").exists() == heeds


def test_a_stopped_run_is_not_requeued(tmp_path: Path) -> None:
    write(tmp_path / "STOP")
    said = bash("EXIT_REQUEUE=75\nrun_again stopped", run=str(tmp_path))
    assert f"not requeued, since {tmp_path}/STOP is there" in said


def test_the_task_that_ended_first_gives_the_status(tmp_path: Path) -> None:
    """The others were told to stop and leave with the higher status 75, which is srun's."""
    write(
        tmp_path / "srun",
        "srun: error: a: task 1: Exited with exit code 1\nsrun: error: b: task 0: Exited with exit code 75\n",
    )
    script = "EXIT_REQUEUE=75 EXIT_STUCK=74 status=75 gone=0 restart=0\nmark=$(progress_mark)\n(finish_stage) || true"
    said = bash(script, run=str(tmp_path), logs=str(tmp_path / "logs"), errors=str(tmp_path / "srun"))
    assert said == f"failed with status 1; read {tmp_path}/logs"


def test_force_holds_until_it_has_brought_something_new(tmp_path: Path) -> None:
    """A restart that began once more would remove what the job itself has made."""
    write(tmp_path / PROGRESS)
    script = f"""
        source slurm/common.sh
        scontrol() {{ echo localhost; }}
        srun() {{ return 75; }}
        export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=localhost
        start() {{
          SLURM_RESTART_COUNT=$1 open_stage train {CONFIG} run.dir={tmp_path} --force >/dev/null
          is_forced && echo forced || echo not
        }}
        start 0
        start 1
        run_step python launch/train.py "${{settings[@]}}"
        start 2
        touch -d '+1 second' {tmp_path}/{PROGRESS}
        start 3
        SLURM_JOB_ID=8
        start 0
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert bash(script, PATH=path, TRSR_SITE="slurm/site.sh").split() == ["forced", "forced", "forced", "not", "forced"]


def test_a_chain_that_is_submitted_inside_a_job_leaves_its_variables_behind(tmp_path: Path) -> None:
    for name, lines in {"sbatch": f"env >>'{tmp_path}/seen'; echo 1", "squeue": ""}.items():
        write(tmp_path / name, f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "3", "SLURM_CONF": "/etc/slurm.conf"}
    bash(f"slurm/pipeline.sh {CONFIG} run.dir={tmp_path}/run", PATH=path, TRSR_SITE="slurm/site.sh", **job)
    seen = {line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith("SLURM_")}
    assert seen == {"SLURM_CONF=/etc/slurm.conf"}


@pytest.mark.parametrize(
    "command",
    [
        f"slurm/pipeline.sh {CONFIG} run.dir=$PWD/run --dry-run",
        f"bash slurm/single.sbatch merge {CONFIG} --dry-run run.dir=$PWD/run",
    ],
)
def test_a_dry_run_submits_and_runs_nothing(tmp_path: Path, command: str) -> None:
    """The merge would be made, and the others be taken for finished stages."""
    for name in ("sbatch", "squeue", "srun", "scontrol"):
        write(tmp_path / name, f"#!/bin/sh\ntouch '{tmp_path}/asked'\necho 1\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}", "TRSR_SITE": "slurm/site.sh"}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    command = command.replace("$PWD", str(tmp_path))
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, env=os.environ | env, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "no job takes --dry-run" in done.stderr, done.stderr
    assert not (tmp_path / "asked").exists() and not (tmp_path / "run").exists()


def test_a_stage_waits_for_all_elements_of_an_array_in_the_queue(tmp_path: Path) -> None:
    """Each has another number, by which Slurm means that element alone."""
    queue = 'case "$*" in *summarize*%F*) printf "100\n100\n100\n" ;; *summarize*%A*) printf "101\n102\n100\n" ;; esac'
    for name, lines in {"sbatch": f"echo \"$@\" >>'{tmp_path}/asked'; echo 7", "squeue": queue}.items():
        write(tmp_path / name, f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    site = {"TRSR_SITE": "slurm/site.sh", "TRSR_PREPARE_OPTIONS": "--array=0-3"}
    said = bash(f"slurm/pipeline.sh {CONFIG} run.dir={tmp_path}/run", PATH=path, **site)
    assert "summarize: job 100 is in the queue already" in said
    lines = (tmp_path / "asked").read_text().splitlines()
    prepare, base = (next(line for line in lines if f"single.sbatch {stage}" in line) for stage in ("prepare", "base"))
    assert "--dependency=afterok:100 " in base
    assert "--array=0-3" in prepare and "--array" not in base, "of several that make one base all but one would fail"


class Outputs:
    """A run folder whose chain is finished."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.config = dump_config(load_config(REPOSITORY / CONFIG, [f"run.dir={run}"]))
        for stage in ("prepare", "summarize", "train", "evaluate"):
            write(run / "config" / f"{stage}.yaml", self.config)
        for stage in ("base", "train", "merge"):
            write(run / "logs" / f"finished-{stage}.yaml", self.config)
        for name in ("histories", "shards/train", "shards/valid", "shards/test", "merged"):
            write(run / name / "manifest.json", name)
        for name in ("base/config.json", "merged/config.json", "evaluation/test.json"):
            write(run / name)
        write(run / "checkpoints/latest", "step-000100\n")
        write(run / "merged/provenance.json", '{"merge": {"source": "checkpoint step-000100"}}')
        model = hashlib.sha256((run / "merged/manifest.json").read_bytes()).hexdigest()
        write(run / "evaluation/test/manifest.json", f'{{"inputs": {{"model": "{model}"}}}}')

    def unfinished(self, *arguments: str) -> list[str]:
        stages = "prepare summarize base train merge evaluate"
        script = f"settings=({' '.join(arguments)})\nfor s in {stages}; do finished $s || echo $s; done"
        return bash(script, run=str(self.run), split="test", merged_config=self.config.rstrip()).split()


@pytest.fixture
def outputs(tmp_path: Path) -> Outputs:
    return Outputs(tmp_path / "my run")


def test_a_finished_chain_has_nothing_left(outputs: Outputs) -> None:
    assert outputs.unfinished() == []
    assert len(outputs.unfinished("--force")) == 6


def test_an_unfinished_training_is_taken_up_although_an_older_one_was_merged(outputs: Outputs) -> None:
    write(outputs.run / "logs/finished-train.yaml", "train: {num_epochs: 1}")
    assert outputs.unfinished() == ["train"]


def test_a_newer_checkpoint_is_merged_and_a_newer_model_evaluated(outputs: Outputs) -> None:
    write(outputs.run / "checkpoints/best", "step-000090\n")
    assert outputs.unfinished() == ["merge"]
    write(outputs.run / "merged/provenance.json", '{"merge": {"source": "checkpoint step-000090"}}')
    write(outputs.run / "merged/manifest.json", "another")
    assert outputs.unfinished() == ["evaluate"]
