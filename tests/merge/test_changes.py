"""From an adapter's tensors to what happens to each tensor of the base: names, scales, halves, refusals."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from safetensors.torch import load_file

from trsr_dist.errors import ModelError
from trsr_dist.files import read_json
from trsr_dist.merge.changes import (
    Change,
    adapter_facts,
    adapter_hash,
    check_mergeable,
    find_changes,
    scale_of,
    write_adapter,
)
from trsr_dist.model.adapters import Adapter

Q = "model.layers.0.self_attn.q_proj"
DOWN, UP = torch.arange(6.0).view(2, 3), torch.arange(8.0).view(4, 2) + 10
"""lora_A of rank 2 from 3 inputs, lora_B to 4 outputs."""


def adapter(tensors: dict[str, torch.Tensor] | None = None, **settings: object) -> Adapter:
    config = LoraConfig(**({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]} | settings))
    return Adapter(Path("folder"), config, pair() if tensors is None else tensors)


def pair(module: str = Q, down: str = "lora_A.weight", up: str = "lora_B.weight") -> dict[str, torch.Tensor]:
    return {f"{module}.{down}": DOWN, f"{module}.{up}": UP}


class TestScale:
    def test_alpha_over_rank(self) -> None:
        assert scale_of(adapter(r=8), Q, 8) == 0.75
        assert scale_of(adapter(r=4, use_rslora=True), Q, 4) == 3.0
        assert scale_of(adapter(r=2, use_rslora=True), Q, 2) == pytest.approx(6 / math.sqrt(2))

    def test_patterns(self) -> None:
        """A pattern is the end of a module's name, at a dot; the others keep the adapter's rank and alpha."""
        found = adapter(r=8, rank_pattern={"q_proj": 3}, alpha_pattern={"layers.0.self_attn.q_proj": 12})
        assert scale_of(found, Q, 3) == 4.0
        assert scale_of(found, Q.replace(".0.", ".1."), 3) == 2.0
        assert scale_of(found, Q.replace("q_proj", "k_proj"), 8) == 0.75
        assert scale_of(found, Q.replace("q_proj", "xq_proj"), 8) == 0.75

    def test_another_rank_is_refused(self) -> None:
        with pytest.raises(ModelError, match=rf"{Q} has rank 3, adapter_config\.json says 2"):
            scale_of(adapter(), Q, 3)


class TestChanges:
    def test_a_pair(self) -> None:
        assert find_changes(adapter()).keys() == {f"{Q}.weight"}
        change = find_changes(adapter())[f"{Q}.weight"]
        assert change.left is UP and change.right is DOWN and change.scale == 3.0
        assert (change.replacement, change.magnitude, change.added) == (None, None, None)
        assert change.rows(torch.zeros(4, 3), 0).equal(3 * UP @ DOWN)

    def test_patterns_hold_for_their_modules(self) -> None:
        changes = find_changes(adapter(pair() | pair("other"), alpha_pattern={"q_proj": 4}))
        assert {name: change.scale for name, change in changes.items()} == {f"{Q}.weight": 2.0, "other.weight": 3.0}

    def test_the_first_fault_by_name_is_told(self) -> None:
        with pytest.raises(ModelError, match="a has no lora_B"):
            find_changes(adapter({f"{name}.lora_A.weight": DOWN for name in "cab"}))

    @pytest.mark.parametrize("kind", ["embedding", "fan in, fan out"])
    def test_transposed_ones(self, kind: str) -> None:
        """The base's tensor is (in, out): A turned over comes first."""
        if kind == "embedding":
            changes = find_changes(adapter(pair(down="lora_embedding_A", up="lora_embedding_B")))
        else:
            changes = find_changes(adapter(), {Q})
        change = changes[f"{Q}.weight"]
        assert change.rows(torch.zeros(3, 4), 0).equal(3 * (UP @ DOWN).T)

    def test_a_bias_of_the_pair(self) -> None:
        added = torch.arange(4.0)
        changes = find_changes(adapter(pair() | {f"{Q}.lora_B.bias": added}, lora_bias=True))
        assert changes.keys() == {f"{Q}.weight", f"{Q}.bias"}
        assert changes[f"{Q}.bias"].added is added and changes[f"{Q}.bias"].scale == 3.0
        assert changes[f"{Q}.bias"].left is None and changes[f"{Q}.weight"].added is None

    def test_dora(self) -> None:
        magnitude = torch.arange(4.0) + 1
        changes = find_changes(adapter(pair() | {f"{Q}.lora_magnitude_vector": magnitude[:, None]}, use_dora=True))
        assert changes[f"{Q}.weight"].magnitude.equal(magnitude)
        assert changes[f"{Q}.weight"].rows(torch.zeros(4, 3), 0).norm(dim=1).tolist() == pytest.approx([1, 2, 3, 4])

    def test_whole_modules_replace_and_pairs_may_lie_on_them(self) -> None:
        whole = torch.ones(4, 3)
        tensors = {f"{Q}.base_layer.weight": whole, "norm.weight": torch.ones(3)} | pair()
        changes = find_changes(adapter(tensors))
        assert changes.keys() == {f"{Q}.weight", "norm.weight"}
        assert changes["norm.weight"].replacement.equal(torch.ones(3)) and changes["norm.weight"].left is None
        assert changes[f"{Q}.weight"].rows(torch.zeros(4, 3), 0).equal(1 + 3 * UP @ DOWN)

    def test_modules_do_not_mix(self) -> None:
        other = Q.replace(".0.", ".1.")
        tensors = pair() | {name: tensor * 2 for name, tensor in pair(other).items()}
        changes = find_changes(adapter(tensors))
        assert changes.keys() == {f"{Q}.weight", f"{other}.weight"}
        assert changes[f"{other}.weight"].left.equal(2 * UP) and changes[f"{Q}.weight"].left.equal(UP)

    @pytest.mark.parametrize(
        ("tensors", "settings", "message"),
        [
            ({f"{Q}.lora_A.weight": DOWN}, {}, f"{Q} has no lora_B"),
            ({f"{Q}.lora_B.weight": UP}, {}, f"{Q} has no lora_A"),
            ({f"{Q}.lora_embedding_B": UP}, {}, f"{Q} has no lora_embedding_A"),
            ({f"{Q}.lora_embedding_A": UP}, {}, f"{Q} has no lora_embedding_B"),
            ({f"{Q}.lora_C.weight": DOWN}, {}, r"lora_C\.weight is no LoRA tensor known here"),
            (pair() | {f"{Q}.lora_B.weight": UP[:, :1]}, {}, r"lora_A \(2, 3\) and lora_B \(4, 1\); expected"),
            (pair() | {f"{Q}.lora_B.weight": UP[:, :, None]}, {}, "expected"),
            (pair() | {f"{Q}.lora_A.weight": DOWN[:, :, None]}, {}, "expected"),
            (pair(), {"use_dora": True}, f"use_dora=True, but {Q} says otherwise"),
            (pair() | {f"{Q}.lora_magnitude_vector": torch.ones(4)}, {}, f"use_dora=False, but {Q}"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tensors: dict, settings: dict, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            find_changes(adapter(tensors, **settings))

    def test_dora_on_a_transposed_layer_is_refused(self) -> None:
        tensors = pair() | {f"{Q}.lora_magnitude_vector": torch.ones(4)}
        with pytest.raises(ModelError, match=f"DoRA on {Q}"):
            find_changes(adapter(tensors, use_dora=True), {Q})


class TestMergeable:
    path = Path("adapter_config.json")

    def test_plain_lora(self) -> None:
        check_mergeable(self.path, adapter().config)

    @pytest.mark.parametrize(
        ("key", "meaning"),
        [
            ("layer_replication", "layers used more than once"),
            ("target_parameters", "LoRA on bare parameters (mixture-of-experts weights)"),
            ("trainable_token_indices", "trainable tokens"),
            ("use_qalora", "QALoRA"),
            ("use_bdlora", "block-diagonal LoRA"),
            ("arrow_config", "Arrow routing"),
            ("kasa_config", "KaSA"),
            ("velora_config", "VeLoRA"),
            ("monteclora_config", "MonteCLoRA"),
        ],
    )
    def test_methods_that_cannot_be_merged(self, key: str, meaning: str) -> None:
        config = adapter().config
        setattr(config, key, True)
        with pytest.raises(ModelError, match=re.escape(f"{key} is set ({meaning});")):
            check_mergeable(self.path, config)

    def test_biases_and_other_kinds(self) -> None:
        with pytest.raises(ModelError, match="bias='all'"):
            check_mergeable(self.path, adapter(bias="all").config)
        with pytest.raises(ModelError, match="peft_type is 'LOHA'"):
            check_mergeable(self.path, LoHaConfig())


class TestIdentity:
    def test_facts(self) -> None:
        settings = {"target_modules": ["v_proj", "q_proj"], "modules_to_save": ["norm", "lm_head"], "use_rslora": True}
        assert adapter_facts(adapter(**settings)) == {
            "r": 2,
            "alpha": 6,
            "use_rslora": True,
            "use_dora": False,
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["lm_head", "norm"],
        }
        set_by_few = {"rank_pattern": {"q": 1}, "alpha_pattern": {"q": 3}, "fan_in_fan_out": True}
        assert set_by_few.items() < adapter_facts(adapter(**set_by_few)).items()
        assert adapter_facts(adapter(target_modules=r".*\.q_proj"))["target_modules"] == r".*\.q_proj"
        bare = adapter_facts(adapter(target_modules=None))
        assert (bare["target_modules"], bare["modules_to_save"]) == ([], [])

    def test_the_hash_changes_with_every_value_name_and_setting(self) -> None:
        first = adapter()
        last = {name: tensor.clone() for name, tensor in pair().items()}
        last[f"{Q}.lora_B.weight"][-1, -1] += 1e-6
        patterns = [adapter(alpha_pattern={"q_proj": 4}), adapter(rank_pattern={"q_proj": 2}, r=3)]
        whole = [adapter(fan_in_fan_out=True), adapter(ensure_weight_tying=True), *patterns]
        others = [adapter(last), adapter(pair("x")), adapter(lora_alpha=7), adapter(dict(reversed(pair().items())))]
        hashes = [adapter_hash(other) for other in (first, *whole, *others)]
        assert len(set(hashes)) == 8 and hashes[-1] == hashes[0], "the order of the tensors does not matter"
        assert adapter_hash(adapter(pair() | {f"{Q}.lora_A.weight": DOWN.T.contiguous().T})) == hashes[0]
        assert hashes[0] == "69103adb5b5a86eaf205c51112662a728cb9c4e44fa6975e3c93318b258b83ba", "of an earlier version"

    def test_a_written_adapter_is_a_peft_folder(self, tmp_path: Path) -> None:
        write_adapter(adapter(pair() | {f"{Q}.lora_A.weight": DOWN.T.contiguous().T}), tmp_path, "the/base")
        found = load_file(tmp_path / "adapter_model.safetensors")
        assert found.keys() == {f"base_model.model.{name}" for name in pair()}
        assert found[f"base_model.model.{Q}.lora_A.weight"].equal(DOWN)
        config = read_json(tmp_path / "adapter_config.json")
        assert (config["base_model_name_or_path"], config["inference_mode"], config["r"]) == ("the/base", True, 2)


def test_changes_are_kept_apart() -> None:
    """Each tensor has its own change, with nothing in it."""
    assert Change() == Change(None, None, None, 1.0, None, None)
