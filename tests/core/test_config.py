import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from tests.core.settings_page import PAGE, page
from trsr_dist.cli import config_parser, parse_config
from trsr_dist.cli import path as path_argument
from trsr_dist.config import dump_config, load_config
from trsr_dist.config.files import read_zero_config
from trsr_dist.config.kinds import RESERVED, marked_settings
from trsr_dist.config.loading import known_keys
from trsr_dist.config.sections import LoraSection, TrainSection
from trsr_dist.errors import ConfigError

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("data: {path: somewhere}\ntrain: {learning_rate: 1e-3}\n")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_opens_with_its_command(path: Path) -> None:
    assert load_config(path).run.dir.startswith("runs/")
    head = path.read_text().split("run:")[0]
    assert "python tools/" in head or "make " in head


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_dumped_config_loads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize("text", ["1e5", "7e10", "010", "1:30", "no", "2024-01-02", "~1", "a #b", "a: b", "null", ""])
def test_dumped_texts_stay_texts(config_file: Path, text: str) -> None:
    """Such as a revision of digits around an e."""
    config = load_config(config_file, [f"model.revision={json.dumps(text)}"])
    config_file.write_text(dump_config(config))
    assert load_config(config_file).model.revision == text


@pytest.mark.parametrize("name", ["2024", "1:30", "no", "my run"])
def test_the_quickstart_takes_a_run_folder_of_any_name(
    monkeypatch: pytest.MonkeyPatch, config_file: Path, name: str
) -> None:
    from launch import quickstart

    called: list[list[str]] = []
    monkeypatch.setattr("subprocess.call", lambda command: called.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--run", name, "--ranks", "1"])
    assert quickstart.main() == 0
    (setting,) = (word for word in called[0] if word.startswith("run.dir="))
    assert load_config(config_file, [setting]).run.dir == name


def test_override_wins_over_file_over_default(config_file: Path) -> None:
    assert load_config(config_file).train.learning_rate == 1e-3
    config = load_config(config_file, ["train.learning_rate=2e-5", "evaluate.top_k=[1, 20]", "data.locale="])
    assert (config.train.learning_rate, config.evaluate.top_k, config.data.locale) == (2e-5, (1, 20), "")
    assert config.train.warmup_ratio == 0.03


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lerning_rate=1", ["train.lerning_rate", "did you mean 'train.learning_rate'"]),
        ("trian.learning_rate=1", ["unknown section 'trian'", "'train'"]),
        ("train.learning_rate=fast", ["train.learning_rate='fast'", "number"]),
        ("data.format=csv", ["data.format='csv'", "'recbole', 'amazon_reviews' or 'demo'"]),
        ("train.keep_checkpoints=1", ["train.keep_checkpoints=1", "greater than or equal to 2"]),
        ("train.negatives_per_positive=30", ["train.pool_size=20"]),
        ("prompt.max_tokens=5000", ["train.row_tokens=4096"]),
        ("summarize.engine=transformers", ["summarize.model is empty"]),
        ("learning_rate=1", ["section.key=value"]),
        ("run.dir", ["section.key=value"]),
        ("run.dir=", ["run.dir=''", "at least 1 character"]),
        ("train.learning_rate=.inf", ["train.learning_rate=inf", "finite"]),
        ("train.adam_betas=[0.9, 1.5]", ["train.adam_betas=1.5", "less than 1"]),
        ("lora.target_modules=[]", ["lora.target_modules=[]", "at least 1 item"]),
        ("data.missed_targets=skip", ["a data.candidates_file misses: name that file"]),
        ("data.split=[10, 1, 0]", ["data.split=[10, 1, 0]", "evaluate.split=test"]),
        ("prompt.answers=[yes, no]", ["prompt.answers=True", "write it in quotes"]),
        ("train.early_stopping_patience=2", ["train.evaluate_every_steps=0"]),
        ("train.deepspeed_config=zero9.json", ["train.deepspeed_config", "no such file"]),
        ("evaluate.deepspeed_config=zero9.json", ["evaluate.deepspeed_config", "no such file"]),
        ("run.seed=-1", ["run.seed=-1", "greater than or equal to 0"]),
        ("base.num_heads=3", ["base.hidden_size=128", "base.num_heads=3", "multiple of 6"]),
        ("base.hidden_size=100", ["base.hidden_size=100", "multiple of 8"]),
        ("base.num_kv_heads=3", ["base.num_heads=4 is no multiple of base.num_kv_heads=3"]),
    ],
)
def test_mistakes_are_named_with_the_way_out(config_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(config_file, [override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.split=[10, 0, 1]", "leaves no valid users for train.evaluate_every_steps=5"),
        ("train.best_metric=recall@7", "train.best_metric='recall@7': expected one of recall@3"),
    ],
)
def test_what_a_validation_needs_is_asked_for_at_once(config_file: Path, override: str, words: str) -> None:
    load_config(config_file, [override])
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(config_file, [override, "train.evaluate_every_steps=5"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.trackers=[wandb, mlflow, wandb]", "run.trackers=.*: 'wandb' stands there twice"),
        ("evaluate.top_k=[5, 10, 5]", "evaluate.top_k=.*: 5 stands there twice"),
        ("evaluate.protocols=[targets, targets]", "evaluate.protocols=.*: 'targets' stands there twice"),
        ("evaluate.baselines=[bm25, bm25]", "evaluate.baselines=.*: 'bm25' stands there twice"),
        ("data.item_fields=[title, title]", "data.item_fields=.*: 'title' stands there twice"),
        ("data.split=[10, -1, 1]", r"data.split=\[10, -1, 1\]: shares are not negative"),
        ("data.split=[0, 1, 1]", r"data.split=\[0, 1, 1\]: .*train's is at least 1"),
    ],
)
def test_lists_that_make_no_sense_are_refused(config_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.r=yes", "lora.r=True: .*integer .*YAML reads yes"),
        ("lora.alpha=on", "lora.alpha=True: .*number .*YAML reads yes"),
        ("lora.r=010", "010 is a number of base 8 or 60"),
        ("lora.r=1:30", "1:30 is a number of base 8 or 60"),
        ("lora.alpha=1:30.5", "1:30.5 is a number of base 8 or 60"),
        ("lora.r='8'", "lora.r='8': .*integer .*without quotes"),
        ("lora.r=8.0", "lora.r=8.0: .*integer"),
        ("run.tensorboard=1", "run.tensorboard=1: .*boolean"),
        ("run.dir=12", "run.dir=12: .*string .*in quotes"),
        ("run.dir=runs/a #b", "YAML reads 'runs/a #b' as 'runs/a'"),
        ("run.dir=#b", "YAML reads '#b' as None"),
        ("run.dir='runs/a' #b", "YAML reads .* as 'runs/a'"),
        ("run.dir=--- a", "YAML reads '--- a' as 'a'"),
        ("run.dir=&foo bar", "anchor or alias .'foo'"),
        ("run.dir=!!str a", "YAML reads '!!str a' as 'a'"),
        ("lora.r=!!int x", "not valid YAML"),
        ("lora.r=!!timestamp x", "not valid YAML"),
        ("run.dir=2024-13-45\0", "not valid YAML"),
        ('run.dir="a\\0b"', "control character"),
        ("run.dir=!!binary aGk=", "YAML reads"),
        ("data.item_fields=!!set {a}", "YAML reads|set"),
        ("lora.r=" + "9" * 5000, "not valid YAML"),
        ("data.item_fields=" + "[" * 3000, "not valid YAML"),
        ("summarize.chat_template_kwargs={tokenize: true}", "'tokenize' is an argument of the tokenizer"),
        ("summarize.chat_template_kwargs={1: true}", "key 1 is no text"),
        ("train.pool_size=10000000", "train.pool_size=10000000: .*less than or equal to 100000"),
        ("train.deepspeed_config=" + "a" * 5000, "train.deepspeed_config=.*name too long"),
    ],
    ids=range(27),
)
def test_nothing_is_read_as_something_else_than_it_looks(config_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(config_file, [override])


@pytest.mark.parametrize("value", ["!!int x", "010", "1:30", "yes", "!!timestamp x", "!!binary aGk=", "&a 8", "{1: 2}"])
def test_files_are_read_as_overrides_are(tmp_path: Path, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{path: a}}\nlora:\n  r: {value}\n")
    with pytest.raises(ConfigError):
        load_config(path)
    path.write_text("data: {path: a}\nlora:\n  r: 8  # of LoRA\n")
    assert load_config(path).lora.r == 8


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.learning_rate=1e-4", 1e-4),
        ("train.learning_rate=1E-4", 1e-4),
        ("train.learning_rate=2.5e5", 2.5e5),
        ("train.learning_rate=.5", 0.5),
        ("train.learning_rate=1", 1.0),
        ("run.dir=my runs/no. 1", "my runs/no. 1"),
        ("run.dir='a #b'", "a #b"),
        ("run.dir=2024-01-02", "2024-01-02"),
        ("run.dir=2024-13-45", "2024-13-45"),
        ("run.dir=none", "none"),
        ("data.path=null", ""),
        ("data.locale= ", ""),
        ("train.max_steps=1_000", 1000),
        ("train.max_steps=0x10", 16),
        ("run.tensorboard=no", False),
        ("evaluate.top_k=[1, 5]", (1, 5)),
        ("data.split=[10, 1, 1]", (10, 1, 1)),
        ("lora.target_modules=all-linear", "all-linear"),
        ("lora.target_modules=[q_proj]", ("q_proj",)),
        ("summarize.chat_template_kwargs={thinking: false}", {"thinking": False}),
    ],
)
def test_overrides_stay_easy_to_write(tmp_path: Path, override: str, value: object) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {format: demo}\n")
    section, key = override.partition("=")[0].split(".")
    found = getattr(getattr(load_config(path, [override]), section), key)
    assert found == value and type(found) is type(value)


def test_the_reserved_names_are_the_librarys() -> None:
    from transformers import PreTrainedTokenizerBase

    known = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"kwargs"}
    assert known <= RESERVED


def test_a_wrong_scheme_is_told_before_the_first_stage(config_file: Path) -> None:
    parser = config_parser("", "")
    assert parse_config(parser, ["--config", str(config_file)])[1].summarize.scheme == "hierarchical"
    with pytest.raises(ConfigError, match="summarize.scheme='tree'.*hierarchical"):
        parse_config(parser, ["--config", str(config_file), "summarize.scheme=tree"])


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)
    broken.write_text("run: 3")
    with pytest.raises(ConfigError, match="section 'run' must hold"):
        load_config(broken)
    broken.write_text("foo: 3")
    with pytest.raises(ConfigError, match="unknown section 'foo'"):
        load_config(broken, ["foo.x=1"])


@pytest.mark.parametrize("text", ["data: {path: a}\ndata: {path: b}", "data: {path: a, locale: UK, path: b}"])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"key '(data|path)' stands twice"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"zero_optimization": 2}',
        '{"zero_optimization": {}}',
        '{"zero_optimization": {"stage": true}}',
        '{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 3}}',
        "[" * 100_000,
        '{"zero_optimization": {"stage": ' + "1" * 5000 + "}}",
    ],
    ids=range(7),
)
def test_zero_files_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="zero.json: (a JSON list|zero_optimization(.stage)?: |not valid JSON)"):
        read_zero_config(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_zero_config(tmp_path)


def test_every_setting_says_what_it_means() -> None:
    from trsr_dist.config import Config

    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description and len(field.description) > 15, name
    assert "train.row_tokens" in known_keys()


@pytest.mark.parametrize(
    ("key", "printed"),
    [("evaluate.top_k", "[3, 5, 10]"), ("data.seen_before_target", "false"), ("run.dir", "runs/quickstart")],
)
def test_one_setting_is_printed_for_scripts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, key: str, printed: str
) -> None:
    from tools.setting import main

    monkeypatch.setattr(sys, "argv", ["setting.py", "--config", str(ROOT / "configs/quickstart.yaml"), "--key", key])
    main()
    assert capsys.readouterr().out.strip() == printed


def test_a_tilde_is_a_home_folder_in_every_path(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shells leave it as it is in key=value and --name=value, and YAML knows nothing of it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ds.json").write_text((ROOT / "ds_configs" / "zero1.json").read_text())
    config_file.write_text("run: {dir: ~/run}\ndata: {path: ~/raw}\n")
    overrides = ["model.name_or_path=~/base", "train.init_adapter=~/adapter", "train.deepspeed_config=~/ds.json"]
    config = load_config(config_file, [*overrides, "summarize.model=~/m", "train.cache_dir=~/cache"])
    found = (config.run.dir, config.data.path, config.model.name_or_path, config.train.init_adapter)
    assert found == tuple(f"{tmp_path}/{name}" for name in ("run", "raw", "base", "adapter"))
    assert (config.summarize.model, config.train.cache_dir) == (f"{tmp_path}/m", f"{tmp_path}/cache")
    assert config.train.deepspeed_config == f"{tmp_path}/ds.json"
    assert path_argument("~/out") == tmp_path / "out" and path_argument("a~b") == Path("a~b")
    parser = config_parser("", "")
    assert parser.parse_args(["--config=~/run.yaml"]).config == config_file
    with pytest.raises(SystemExit):
        parser.parse_args(["--config=~nobody.here/run.yaml"])
    assert "no home folder of '~nobody.here' is known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [('"a\\0b"', "holds a control character"), ("~nobody.here/x", "no home folder of '~nobody.here'")],
)
def test_paths_that_can_be_none_are_refused(config_file: Path, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.dir=[\s\S]*{message}"):
        load_config(config_file, [f"run.dir={value}"])


FREE_ON_RESUME = {
    "negatives_per_positive",  # the stream's state holds it
    "pool_size",  # the shards' manifest does
    "pool",  # the stream's state, through the plan
    "num_epochs",  # through the number of steps, which is compared
    "max_steps",
    "row_tokens",  # the stream's state
    "rows_per_step",
    "deepspeed_config",
    "activation_checkpointing",
    "num_workers",
    "shards_url",
    "cache_dir",
    "cache_gb",
    "save_every_steps",
    "keep_checkpoints",
    "evaluate_every_steps",
    "evaluate_users",  # the trainer's state holds what the best value depends on
    "early_stopping_patience",
    "log_every_steps",
    "timeout_seconds",
    "hang_seconds",
    "data_errors",
    "max_data_errors",
    "max_bad_steps",
    "walltime_seconds",
}
"""Settings of a training that may change when it goes on, or that something else compares."""


def test_every_setting_of_a_training_says_what_a_change_means() -> None:
    sections = (TrainSection(), LoraSection())
    marked = {name for section in sections for name in marked_settings(section)}
    names = {name for section in sections for name in type(section).model_fields}
    assert names - marked == FREE_ON_RESUME, "mark a new setting with OnResume, or list it here with the reason"


def test_the_settings_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.core.settings_page"
