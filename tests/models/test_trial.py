"""What two texts tell of a network: causality, modules that can be probed, probes that share."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe
from fedforward.models.full import FullModel
from fedforward.models.grouping import settled
from fedforward.models.lora import LoraModel
from fedforward.models.trial import check_causal, examine, patterns, shared_weights, trial_tokens
from tests.models.test_models import PERTURBATION, TRAJECTORY, batch, lora, plan

Make = Callable[..., Any]


def small(family: str, **settings: Any) -> Any:
    """A tiny network of a family with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(family, **(sizes | settings))
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return network.eval().requires_grad_(False)


def mixtral() -> Any:
    return small("mixtral", num_local_experts=4, num_experts_per_tok=2)


class Routed(nn.Module):
    """A block's perceptron with experts that are linear modules, as older code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The first expert is given the tokens above its threshold, the second the others."""
        flat = x.reshape(-1, x.shape[-1])
        chosen = (flat[:, 0] > 0).long()
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            places = (chosen == number).nonzero()[:, 0]
            if len(places):
                out = out.index_add(0, places, expert(flat[places]))
        return out.view(x.shape)


def with_routed_experts(make: Make) -> Any:
    network = make()
    torch.manual_seed(1)
    for layer in network.model.layers:
        layer.mlp = Routed().requires_grad_(False)
    return network


# Causality ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_a_model_that_reads_both_ways_is_refused(family: str) -> None:
    with pytest.raises(FedForwardError, match=r"model\.path = 'x' is not causal.*is_decoder"):
        check_causal(small(family), "x")
    check_causal(small(family, is_decoder=True), "x")


def test_rows_that_change_each_other_are_refused(tiny_network: Make) -> None:
    network = tiny_network()
    check_causal(network, "x")
    network.model.layers[0].register_forward_hook(lambda _, __, out: out + out.mean(dim=0))
    with pytest.raises(FedForwardError, match="the other rows of its batch"):
        check_causal(network, "x")


def test_a_network_that_fails_is_a_sentence(tiny_network: Make) -> None:
    network = tiny_network()

    def fails(*_: Any) -> None:
        raise AttributeError("pixel_values are needed")

    network.model.layers[0].register_forward_pre_hook(fails)
    with pytest.raises(FedForwardError, match=r"fails on two short texts \(AttributeError: pixel"):
        check_causal(network, "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_no_reason(tiny_network: Make, dtype: str) -> None:
    check_causal(tiny_network(dtype), "x")
    model = FullModel(tiny_network(dtype), plan=plan(2))
    assert settled(model) == model.plan


def test_special_tokens_are_left_out(tiny_network: Make) -> None:
    network = tiny_network()
    network.config.image_token_id = 50
    tokens = trial_tokens(network)
    assert tokens.shape[0] == 2
    assert not torch.isin(tokens, torch.tensor([0, 1, 2, 50])).any()
    assert len(tokens.unique()) > 20


# Modules ------------------------------------------------------------------------------------------


def test_all_linear_leaves_out_what_cannot_be_probed() -> None:
    model = lora(mixtral())
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in model.tensors}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert (
        "model.layers.*.mlp.experts, model.layers.*.mlp.gate (no linear module)" in model.left_out
    )


def test_all_linear_is_everything_but_the_head(tiny_network: Make) -> None:
    model = lora(tiny_network(tie=False))
    assert len(model.tensors) == 2 * 7 * 2
    assert model.left_out == ""
    assert sorted(model.peft.peft_config["default"].target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_a_state_space_model_is_adapted_by_default() -> None:
    model = lora(small("mamba", state_size=4))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in model.tensors} == {
        "in_proj",
        "x_proj",
    }
    assert "out_proj (not adapted or not loaded by PEFT" in model.left_out
    with pytest.raises(
        FedForwardError, match=r"lora\.targets = \[\'out_proj\'\] takes in .*out_proj, which PEFT"
    ):
        lora(small("mamba", state_size=4), targets=["out_proj"])


def test_a_router_that_is_a_linear_module_is_refused() -> None:
    sizes = {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8}
    network = small("llama4_text", **sizes)
    model = lora(network)
    assert "router (more than a linear map)" in model.left_out
    with pytest.raises(FedForwardError, match="router, a Llama4Router that is more than a linear"):
        lora(small("llama4_text", **sizes), targets=["router"])


def test_what_is_no_linear_module_is_refused(tiny_network: Make) -> None:
    with pytest.raises(FedForwardError, match="embed_tokens, a Embedding, and only linear"):
        lora(tiny_network(), targets=["embed_tokens"])


def test_experts_that_are_linear_modules(tiny_network: Make) -> None:
    """They are left out; named, they are probed one at a time, and rightly."""
    reasons = examine(with_routed_experts(tiny_network)).linear
    for number in range(3):
        assert reasons[f"model.layers.0.mlp.experts.{number}"] == "given some of the tokens only"
    model = lora(with_routed_experts(tiny_network))
    assert "mlp.experts.* (given some of the tokens only)" in model.left_out
    model = lora(with_routed_experts(tiny_network), targets=["experts.0", "experts.1"])
    with pytest.raises(FedForwardError, match=r"run\.probes_per_call = 1"):
        model.evaluate([Probe(batch(), TRAJECTORY, s) for s in (PERTURBATION, TRAJECTORY)])
    model.plan = settled(model)
    assert model.plan.probes_per_call == 1
    assert model.plan.alone
    moved, other = model.evaluate([Probe(batch(), p) for p in (TRAJECTORY, PERTURBATION)])
    assert moved.mean != other.mean


def test_an_expert_that_no_token_goes_to_is_tuned(tiny_network: Make) -> None:
    model = FullModel(with_routed_experts(tiny_network), plan=plan(1))
    assert "model.layers.0.mlp.experts.2.weight" in model.tensors
    model.evaluate([Probe(batch(), TRAJECTORY, PERTURBATION)])


def test_what_a_text_does_not_run_through_is_not_tuned(tiny_network: Make) -> None:
    network = tiny_network()
    network.tower = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)).requires_grad_(False)
    whole = {n for n in dict(network.named_parameters()) if not n.startswith("tower")}
    model = FullModel(network, plan=plan(2))
    assert set(model.tensors) == whole
    assert "leaves out 4 tensors" in model.left_out
    assert "tower.*.bias, tower.*.weight" in model.left_out
    model.evaluate([Probe(batch(), TRAJECTORY, PERTURBATION)])
    adapted = tiny_network()
    adapted.tower = network.tower
    assert "tower.* (not called)" in lora(adapted).left_out


def test_an_adapter_on_a_shared_weight_is_not_merged(tiny_network: Make) -> None:
    def shared() -> Any:
        network = tiny_network()
        first, second = (layer.mlp for layer in network.model.layers)
        second.down_proj.weight = first.down_proj.weight
        return network

    assert sorted(name for name in shared_weights(shared()) if name != "lm_head") == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert "down_proj (with a weight that several modules share)" in lora(shared()).left_out
    with pytest.raises(FedForwardError, match="shares its weight"):
        lora(shared(), targets=["down_proj"]).merge()


def test_names_as_patterns() -> None:
    assert patterns(["a.0.b", "a.11.b", "a.1.c"]) == "a.*.b, a.*.c"
    assert patterns([f"n{k}" for k in range(6)], 2) == "n0, n1 and 4 more"


# Probes that share a pass -------------------------------------------------------------------------


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_probes_that_can_share_do(tiny_network: Make, tune: str) -> None:
    model = lora(tiny_network()) if tune == "lora" else FullModel(tiny_network(), plan=plan(2))
    before = model.digest()
    assert settled(model) == model.plan
    assert model.digest() == before


def test_experts_are_probed_one_after_another() -> None:
    model = FullModel(mixtral(), plan=plan(2))
    found = settled(model)
    assert found == replace(model.plan, probes_per_call=1, alone=found.alone)
    assert found.alone == "the network does not keep the rows of a batch apart"
    assert model.plan.probes_per_call == 2


@pytest.mark.parametrize(("family", "alone"), [("llama", False), ("mixtral", True)])
def test_classifiers_are_tried_as_well(family: str, alone: bool) -> None:
    from transformers import AutoModelForSequenceClassification

    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if alone else {}
    config = small(family, **more).config
    config.num_labels = 3
    network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model = FullModel(network.requires_grad_(False), plan=plan(4))
    assert bool(settled(model).alone) == alone


def test_buffers_are_part_of_a_base(tiny_network: Make) -> None:
    """Some routers keep a correction in one."""
    network = tiny_network()
    plain = FullModel(network, plan=plan()).base_fingerprint, lora(network).base_fingerprint
    other = tiny_network()
    other.register_buffer("computed", torch.ones(3), persistent=False)
    assert FullModel(other, plan=plan()).base_fingerprint == plain[0]
    other.register_buffer("correction", torch.ones(3))
    assert FullModel(other, plan=plan()).base_fingerprint != plain[0]
    assert lora(other).base_fingerprint != plain[1]


def test_losses_that_grouping_changes_are_found(tiny_network: Make) -> None:
    """Rows are as they must be while groups are alike, so that nothing but the loss tells."""
    network = tiny_network()

    def first_half(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        # A state that is made once for all groups, from the rows of the first.
        return out + 3.0 * out[:2].mean(dim=(0, 1))

    network.model.layers[0].register_forward_hook(first_half)
    for model in (lora(network), FullModel(network, plan=plan(2))):
        assert settled(model).alone == "grouped losses differ from single ones"


def test_a_prefix_that_cannot_be_shared_is_not() -> None:
    """Bloom's positions are no rows of a batch; its blocks run once for each probe."""
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = lora(small("bloom", **sizes))
    model.plan = settled(model)
    assert model.plan.probes_per_call > 1
    assert not model.plan.shares_prefix
    last = lora(small("bloom", **sizes), blocks=[1])
    last.plan = settled(last)
    probes = [Probe(batch(), TRAJECTORY, s) for s in (PERTURBATION, TRAJECTORY)]
    together = [e.mean for e in last.evaluate(probes)]
    last.plan = replace(last.plan, probes_per_call=1)
    assert together == pytest.approx([e.mean for e in last.evaluate(probes)], rel=1e-6)


def test_a_model_from_a_folder_is_settled(tmp_path: Path) -> None:
    from tests.test_architectures import load

    load().folder_of("mixtral", tmp_path / "mixtral")
    model = FullModel.from_pretrained(tmp_path / "mixtral", device="cpu")
    assert model.plan.alone
    assert LoraModel.from_pretrained(tmp_path / "mixtral", device="cpu").plan.left_out
