"""``trsr COMMAND ...``: the scripts of ``launch/`` and ``tools/``, from a wheel or from the repository.

Launchers start it as a module: ``torchrun --nproc_per_node 8 -m trsr_dist train ...``, ``deepspeed --module trsr_dist
train ...``.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator

from trsr_dist.cli import path, run_command
from trsr_dist.config.files import shipped_file
from trsr_dist.environment import expand_home
from trsr_dist.errors import ConfigError
from trsr_dist.log import show

GROUPS = {
    "to begin with": {"quickstart": "launch/quickstart.py"},
    "data": {
        "prepare": "tools/prepare_data.py",
        "summarize": "launch/summarize.py",
        "inspect": "tools/inspect_shards.py",
    },
    "training": {
        "fetch": "tools/fetch_smollm2.py",
        "base": "tools/make_tiny_base.py",
        "plan": "tools/plan.py",
        "preflight": "launch/preflight.py",
        "train": "launch/train.py",
        "status": "tools/status.py",
        "merge": "tools/merge_lora.py",
        "score": "tools/score_shards.py",
        "mine": "tools/mine_negatives.py",
        "choose": "tools/choose_summaries.py",
    },
    "evaluation": {
        "evaluate": "tools/evaluate.py",
        "compare": "tools/compare.py",
        "leaderboard": "tools/leaderboard.py",
    },
    "use": {"predict": "tools/predict.py", "verify": "tools/verify_server.py", "push": "tools/push.py"},
    "for scripts": {"setting": "tools/setting.py"},
}
"""In the order of the data."""
COMMANDS = {name: script for group in GROUPS.values() for name, script in group.items()}


def main() -> None:
    """Run the command's script with the rest of the arguments, as ``python SCRIPT`` does, or tell what there is."""
    # DeepSpeed puts its own argument before all others.
    arguments = [text for text in sys.argv[1:] if not text.startswith("--local_rank=")] or ["--help"]
    if arguments[0] in COMMANDS:
        sys.argv = [f"trsr {arguments[0]}", *arguments[1:]]
        runpy.run_path(str(shipped_file(COMMANDS[arguments[0]])), run_name="__main__")
        return
    parser = argparse.ArgumentParser(
        prog="trsr",
        usage="trsr COMMAND ...   (trsr COMMAND --help describes one)",
        epilog="\n".join(_describe_commands()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shells = {"choices": ("bash", "zsh", "tcsh"), "help": "print what this shell needs to complete trsr, and leave"}
    parser.add_argument("--completion", **shells)
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    shell = parser.parse_args(arguments).completion
    run_command(lambda: show(_completion(shell)))


def _describe_commands() -> Iterator[str]:
    """Group by group, each with the first sentence of its script."""
    for group, commands in GROUPS.items():
        yield f"\n{group}:"
        for name, script in commands.items():
            text = ast.get_docstring(ast.parse(shipped_file(script).read_text(encoding="utf-8"))) or ""
            sentence = re.split(r"\.\s|\.$", text)[0]
            indents = {"initial_indent": f"  {name:13}", "subsequent_indent": " " * 15}
            yield textwrap.fill(f"{sentence} ({script})", 110, **indents)


def _completion(shell: str) -> str:
    """The shell's script, from the parsers of all commands.

    Raises:
        ConfigError: shtab is missing.
    """
    try:
        import shtab
    except ImportError:
        raise ConfigError("completion needs shtab: pip install 'trsr_dist[completion]'") from None
    parser = argparse.ArgumentParser(prog="trsr")
    subparsers = parser.add_subparsers()
    for name, script in COMMANDS.items():
        command = runpy.run_path(str(shipped_file(script)))["build_parser"]()
        for action in command._actions:
            if action.type in (path, expand_home):
                action.complete = shtab.FILE
        subparsers.add_parser(name, parents=[command], add_help=False, help=script)
    return shtab.complete(parser, shell)


if __name__ == "__main__":
    main()
