"""The built wheel in an empty environment outside the repository: commands, configs, launchers, completion."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from trsr_dist import __main__ as command

ROOT = Path(__file__).parents[2]
BUILT_FROM = ("trsr_dist", "configs", "ds_configs", "launch", "tools")
SMALL = ("demo.num_users=60", "demo.num_items=100", "run.dir=run")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its own folders beside setup.py."""
    source = tmp_path_factory.mktemp("source")
    for name in BUILT_FROM:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", source / "dist", source], check=True)
    return next((source / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds bin/trsr. What the package needs is taken from where the tests run, the package from the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "present.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", folder / "bin" / "python"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    return folder


def run(folder: Path, *arguments: str, program: str = "trsr") -> str:
    """What a command prints; it must end well."""
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [folder / "bin" / program, *arguments]
    done = subprocess.run(command, cwd=folder, env=away | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_one_copy_of_scripts_and_configs(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"trsr_dist"}
    expected = {f"trsr_dist/{path.relative_to(ROOT)}" for name in BUILT_FROM[1:] for path in (ROOT / name).glob("*.*")}
    needing_benchmarks = {"trsr_dist/tools/benchmark.py", "trsr_dist/tools/gpu_check.py"}
    assert expected - names == needing_benchmarks and not needing_benchmarks & names
    scripts = {f"trsr_dist/{script}" for script in command.COMMANDS.values()}
    assert {name for name in names if name.startswith(("trsr_dist/launch/", "trsr_dist/tools/"))} == scripts


def test_help_names_the_stages_in_the_order_of_the_data(folder: Path) -> None:
    listed = [
        line.split()[0] for line in run(folder, "--help").splitlines() if line[:2] == "  " and line[2:3].isalpha()
    ]
    assert listed == list(command.COMMANDS)


def test_stages_run_with_the_shipped_configs(folder: Path) -> None:
    settings = ("--config", "configs/quickstart.yaml", *SMALL)
    run(folder, "prepare", *settings)
    run(folder, "summarize", *settings)
    assert (folder / "run/shards/train").is_dir()
    as_launchers_do = run(folder, "-m", "trsr_dist", "status", "run", program="python")
    assert "train" in as_launchers_do and as_launchers_do == run(folder, "status", "run")


def test_deepspeed_puts_its_argument_first(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    asked = ["--local_rank=0", "setting", "--config", "configs/mind.yaml", "--key", "run.dir"]
    monkeypatch.setattr(sys, "argv", ["trsr", *asked])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 0
    assert capfd.readouterr().out == "runs/mind\n"


def test_completion_knows_commands_options_and_values(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    monkeypatch.setattr(command, "COMMANDS", {name: command.COMMANDS[name] for name in ("status", "merge")})
    monkeypatch.setattr(sys, "argv", ["trsr", "--completion", "bash"])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 0
    script, typed = (
        capfd.readouterr().out,
        {"trsr me": "merge", "trsr merge --ver": "--verify", "trsr merge --verify s": "scores"},
    )
    for line, completed in typed.items():
        words = f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; _shtab_trsr; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", f"{script}\n{words}"], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [completed]
