"""What others have written steers no terminal."""

import ast
import sys
from pathlib import Path

import pytest

from trsr_dist.cli import run_command
from trsr_dist.errors import DataError
from trsr_dist.log import get_logger, setup_logging, show
from trsr_dist.printable import in_one_line, printable

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b[31mred\x1b]0;title\x07\r\x9b2J\x7f\u202eevil\u2066\u2028\ud800\tb\nc \u05e9 é 日"
SHOWN = r"a\x1b[31mred\x1b]0;title\x07\x0d\u009b2J\x7f\u202eevil\u2066\u2028\ud800" + "\tb\nc \u05e9 é 日"


def test_control_characters_are_escaped_and_texts_stay() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("é 日", "ascii") == r"\xe9 \u65e5"
    assert in_one_line("a\nb \t c", 10) == "a b c" and in_one_line("x" * 20, 10) == "x" * 7 + "..."


def test_log_lines_errors_and_what_commands_show_are_escaped(capsys: pytest.CaptureFixture) -> None:
    setup_logging(stage="test")
    get_logger("test").warning("user %s", HOSTILE)
    show(HOSTILE)

    def fail() -> None:
        raise DataError(HOSTILE)

    with pytest.raises(SystemExit, match="1"):
        run_command(fail)
    output = capsys.readouterr()
    assert output.out == f"[test] user {SHOWN}\n{SHOWN}\n"
    assert output.err == f"error: {SHOWN}\n"


def test_a_file_that_cannot_be_read_is_no_traceback(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1"):
        run_command(lambda: int((tmp_path / "missing").read_text()))
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/missing: ")
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_nothing_is_printed_past_the_escaping() -> None:
    plain = {"trsr_dist/log.py", "trsr_dist/cli.py", "tools/setting.py"}  # the last one: values for scripts
    for folder in ("trsr_dist", "launch", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            prints = [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]
            assert not prints or name in plain, f"{name}:{prints}"


def test_a_reader_that_has_seen_enough_is_no_traceback(tmp_path: Path) -> None:
    import subprocess

    code = "import sys; sys.path.insert(0, sys.argv[1]); from trsr_dist.cli import run_command\n"
    code += "from trsr_dist.log import show\nrun_command(lambda: [show('x' * 1000) for _ in range(1000)] and None)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.communicate()[1] == "" and process.returncode == 1
