"""Config files, overrides and DeepSpeed files, read and used as far as no data is needed.

Oracle: YAML's ``BaseLoader``, which leaves every scalar as it is written. A setting must be what its text says (8 for
``8`` and ``8.0``, not for ``010`` or ``yes``; of an override the whole text counts, comment or anchor included), every
other setting its default, a key that stands twice is refused, and the dumped config must load back equal. A DeepSpeed
file is compared with a strict JSON reader's value.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz.mutations import FILES, as_nobody, change_bytes, change_json, dump
from tests.fuzz.running import Case, Kind
from tests.tokenizers import byte_level
from trsr_dist.config import Config, dump_config, load_config
from trsr_dist.config.files import read_zero_config
from trsr_dist.config.loading import known_keys
from trsr_dist.data.prepare import prepare
from trsr_dist.summarize.engines.encoding import PromptEncoder

BASE = {
    "run": {"dir": "runs/x", "seed": 3},
    "data": {"format": "demo", "min_history": 2},
    "summarize": {"engine": "extractive", "block_size": 4},
    "train": {"learning_rate": 0.003, "num_epochs": 2},
    "lora": {"target_modules": ["q_proj", "v_proj"]},
}
TEXTS = (
    "yes", "no", "on", "Off", "y", "true", "TRUE", "~", "null", "", "010", "0o10", "0x10", "0b11", "1_000", "1:30",
    "1:30:00", "1e3", "1E3", "1.", ".5", "-1", "+8", "8", "8.0", "8.5", "0", "-0", "1e400", ".inf", "-.INF", ".nan",
    "9" * 400, "9" * 5000, "2024-01-02", "2024-13-45", "2024-01-02T03:04:05Z", "99:99:99", "!!int x", "!!float x",
    "!!bool x", "!!timestamp x", "!!binary x", "!!null x", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]",
    "!!python/name:os.system",
    "!!str 8", "!foo bar", "&foo bar", "*foo", "a #b", "runs/a #b", "#b", "a: b", "- a", "[1", "]", "{a: 1}", "{a",
    "[]",
    "{}", "[1, 2, 3]", "[a, b]", "[[1]]", "[1, [2, [3]]]", "[" * 2000, "[" * 500 + "]" * 500, "'a", '"a', "'8'", '"8"',
    '"\\x1b[31m"', '"\\0"', '"\\ud83d"', '"a\\nb"', "a\\nb", "１２", "٣", "🎾", "@a", "`a", "%a", "|", ">", "? a",
    "...", "---",
    "--- a", "a\u2028b", "a\u0085b", "\u200b", "\ufeff8", "x" * 10000, "<<: a", "auto", "mind", "ndcg@10",
    "RUN/base", "inf", "nan",
    "None", "8 ", "\t8", "8\t", "{tokenize: true}", "{tokenizer: a}", "{add_generation_prompt: false}",
    "{conversation: 1}",
    "{messages: []}", "{self: 1}", "{return_tensors: pt}", "{1: 2}", "{a: 2024-01-02}", "{a: [1, 1]}",
    "{a: 1, a: 2}", "{chat_template: x}",
    "../../x", "/dev/null", "/proc/self/mem", "nowhere.json", "ds_configs", "a\x00b", "\x1b]0;x\x07", "~/x",
    "$HOME", "a=b",
)  # fmt: skip
PLAUSIBLE = (
    "8", "8.0", "0.5", "1e-3", "2.5e-4", "0", "1", "64", "true", "false", "cut", "runs/y", "x y", "[a, b]",
    "[0.9, 0.95]", "'8'", '"a b"',
)  # fmt: skip
NULLS = ("", "~", "null", "Null", "NULL")
TRUE, FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")


def make(draw: random.Random, folder: Path, world: Path) -> Case:
    """A file with one kind of change, overrides, or a DeepSpeed file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(BASE))
    match draw.randrange(10):
        case 0 | 1 | 2 | 3:
            return _overrides(draw, path)
        case 4 | 5 | 6:
            return _settings(draw, path)
        case 7:
            return _bytes(draw, path)
        case 8:
            return _form(draw, path)
    return _deepspeed(draw, path, world)


def _overrides(draw: random.Random, path: Path) -> Case:
    overrides = []
    for _ in range(draw.choice((1, 1, 2))):
        key = draw.choice((*known_keys(), *KEYS_OFTEN))
        if draw.random() < 0.1:
            key = draw.choice(
                (
                    f"{key}x",
                    key.upper(),
                    key.replace(".", ""),
                    f"{key}.a",
                    f" {key}",
                    "x.y",
                    "\x1b[31m.a",
                    "",
                    "run.\x1b[2J",
                )
            )
        overrides.append(f"{key}={_text(draw)}")
    if draw.random() < 0.05:
        overrides.append(draw.choice(("", "=", "a", "--x", "\x1b[31m", "run.dir", "=8")))
    return _case(path, overrides, f"overrides {[text[:60] for text in overrides]}")


def _text(draw: random.Random) -> str:
    return draw.choice(TEXTS if draw.random() < 0.7 else PLAUSIBLE)


KEYS_OFTEN = ("summarize.chat_template_kwargs",) * 8 + ("run.dir", "lora.r", "train.deepspeed_config") * 3


def _settings(draw: random.Random, path: Path) -> Case:
    """Lines of the file, written as text."""
    lines, told = path.read_text().splitlines(), []
    for _ in range(draw.choice((1, 1, 2))):
        section, _, name = draw.choice((*known_keys(), *KEYS_OFTEN)).partition(".")
        text = _text(draw).replace("\n", " ")
        place = next((i for i, line in enumerate(lines) if line == f"{section}:"), None)
        kept = [line for line in lines if not line.startswith(f"  {name}:")] if draw.random() < 0.9 else lines
        if place is None or f"{section}:" not in kept:
            kept = [*kept, f"{section}:"]
        kept.insert(kept.index(f"{section}:") + 1, f"  {name}: {text}")
        lines = kept
        told.append(f"{section}.{name}: {text[:60]!r}")
    path.write_bytes(("\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    return _case(path, [], f"lines {told}")


def _bytes(draw: random.Random, path: Path) -> Case:
    data, what = change_bytes(draw, path.read_bytes())
    path.write_bytes(data)
    return _case(path, [], f"run.yaml: {what}")


def _form(draw: random.Random, path: Path) -> Case:
    """Another form of the same, or something that is no config at all."""
    text = path.read_text()
    same = {
        "CR LF": text.replace("\n", "\r\n").encode(),
        "byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "comments": text.replace("\n", "  # a comment\n").encode(),
        "JSON": json.dumps(BASE).encode(),
        "UTF-16": text.encode("utf-16"),
        "sections in another order": yaml.safe_dump(dict(reversed(BASE.items())), sort_keys=False).encode(),
    }
    other = {
        "a list": b"- a\n", "a text": b"hello\n", "a number": b"8\n", "tabs": text.replace("  ", "\t").encode(),
        "two documents": f"{text}---\n{text}".encode(), "a section twice": f"{text}run:\n  dir: y\n".encode(),
        "anchors without end": b"a: &a [*a]\n", "a bomb": _bomb(), "a section empty": b"run:\n",
    "keys of numbers": b"1: {2: 3}\n",
        "an escape in a key": b'"run\\e[31m": {dir: x}\n', "an escape in a name": b'run: {"\\e[31m": x}\n',
        "a null key": b"~: {a: b}\n", "a list as key": b"? [a]\n: b\n", "a date as key": b"2024-01-02: {a: b}\n",
        "Latin-1": "run: {dir: Müller}\n".encode("latin-1"), "deep": b"run: " + b"{a: " * 3000 + b"}" * 3000,
    }  # fmt: skip
    if draw.random() < 0.4:
        name = draw.choice(sorted(same))
        path.write_bytes(same[name])
        return _case(path, [], f"form: {name}", same=name != "UTF-16")
    if draw.random() < 0.6:
        name = draw.choice(sorted(other))
        path.write_bytes(other[name])
        return _case(path, [], f"form: {name}")
    name = draw.choice(sorted(FILES))
    FILES[name](path)
    return _case(path, [], f"file: {name}", nobody=name == "unreadable")


def _bomb() -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines).encode()


def _deepspeed(draw: random.Random, path: Path, world: Path) -> Case:
    """The DeepSpeed file that the config names."""
    zero = path.parent / "zero.json"
    value = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 50000000, "offload_param": {"device": "cpu"}}}
    zero.write_text(json.dumps(value))
    nobody = False
    match draw.randrange(4):
        case 0:
            name = draw.choice(sorted(FILES))
            FILES[name](zero)
            what, nobody = f"file {name}", name == "unreadable"
        case 1:
            data, what = change_bytes(draw, zero.read_bytes())
            zero.write_bytes(data)
        case 2:
            zero.write_text('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 3}}')
            what = "a key twice"
        case _:
            value, what = change_json(draw, value)
            zero.write_text(dump(value), errors="surrogatepass")
    key = draw.choice(("train.deepspeed_config", "evaluate.deepspeed_config"))
    return _case(path, [f"{key}={zero}"], f"{key}: {what}", nobody=nobody, zero=zero)


def _case(
    path: Path, overrides: list[str], title: str, same: bool = False, nobody: bool = False, zero: Path | None = None
) -> Case:
    loaded: list[Config] = []

    def act() -> int:
        if nobody:
            with as_nobody():
                load_config(path, overrides)
        loaded.append(load_config(path, overrides))
        _use(loaded[0])
        return 0

    keys = [override.partition("=")[0].strip() for override in overrides]
    names = (
        path.name,
        "override",
        "unknown section",
        "unknown key",
        *filter(None, keys),
        *(f"'{key.partition('.')[0]}'" for key in keys),
        "data.",
        "demo.",
        "train.",
    )
    if zero is not None:
        names += (zero.name,)
    return Case(title, act, names, partial(_judge, path, overrides, loaded, zero), same)


def _use(config: Config) -> None:
    """What the commands do with a config before they look for data."""
    prepare(config.model_copy(update={"data": config.data.model_copy(update={"format": "demo"})}), dry_run=True)
    PromptEncoder(byte_level(chat=True), "chat", 2048, config.summarize.chat_template_kwargs)


def _judge(path: Path, overrides: list[str], loaded: list[Config], zero: Path | None, status: int, output: str) -> str:
    if status or not loaded:
        return ""
    config = loaded[0]
    copy = path.with_name("copy.yaml")
    copy.write_text(dump_config(config), encoding="utf-8")
    if load_config(copy) != config:
        return "the dumped config loads as another one"
    if zero is not None:
        return _zero_fault(zero)
    return next(_faults(path, overrides, config), "")


def _zero_fault(zero: Path) -> str:
    try:
        expected = json.loads(zero.read_bytes(), object_pairs_hook=_once, parse_constant=_refuse)
    except ValueError as error:
        return f"{zero.name} is accepted: {error}"
    return "" if read_zero_config(zero) == expected else "another value than a strict reader's"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _faults(path: Path, overrides: list[str], config: Config) -> Iterator[str]:
    text = path.read_bytes().decode("utf-8-sig")
    if "<<" in text:
        return
    node = yaml.compose(text, yaml.BaseLoader)
    yield from _doubles(node)
    written = yaml.load(text, yaml.BaseLoader) or {}
    told = {(section, name): value for section, values in written.items() for name, value in (values or {}).items()}
    literal = {}
    for override in overrides:
        key, _, value = override.partition("=")
        section, _, name = key.partition(".")
        literal[section, name] = value
    for section, model in config:
        for name, value in model:
            if (section, name) in literal:
                is_right = _means_override(value, literal[section, name])
                source = literal[section, name]
            elif (section, name) in told:
                is_right, source = _means(value, told[section, name]), told[section, name]
            else:
                is_right, source = value == getattr(type(model)(), name), "its default"
            if not is_right:
                yield f"{section}.{name} is {value!r}, the text says {str(source)[:80]!r}"


def _doubles(node: yaml.Node | None, depth: int = 0) -> Iterator[str]:
    if isinstance(node, yaml.MappingNode) and depth < 20:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) != len(keys):
            yield f"a key stands twice in {keys}"
        for _, value in node.value:
            yield from _doubles(value, depth + 1)


def _means_override(value: Any, text: str) -> bool:
    """The whole text counts: neither a comment nor an anchor may vanish."""
    if value == text or isinstance(value, str) and value == text.strip():
        return True
    if re.match(r"[\[{\"']", text.strip()):
        try:
            return _means(value, yaml.load(text, yaml.BaseLoader))
        except yaml.YAMLError:
            return False
    return not isinstance(value, tuple | list | dict) and _means(value, text.strip().removeprefix("!!str "))


def _means(value: Any, written: Any) -> bool:
    """Whether a setting's value is what stands there."""
    if isinstance(value, dict):
        return (
            isinstance(written, dict)
            and value.keys() == written.keys()
            and all(_means(value[k], written[k]) for k in value)
        )
    if isinstance(value, tuple | list):
        return isinstance(written, list) and len(value) == len(written) and all(map(_means, value, written))
    if not isinstance(written, str):
        return False
    if value is None:
        return written in NULLS
    if isinstance(value, bool):
        return written.lower() in (TRUE if value else FALSE)
    if isinstance(value, str):
        return value == written or not value and written in NULLS
    if re.fullmatch(r"[-+]?[0-9_]+", written):
        return int(written.strip("_")[:4000]) == value
    try:
        return float(written) == value
    except ValueError:
        return bool(re.fullmatch(r"0[xob][0-9a-fA-F]+", written)) and int(written, 0) == value


KIND = Kind("config", 600, 40.0, lambda folder: folder, make)
