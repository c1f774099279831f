"""Runs that go on from a LoRA adapter: PEFT's loss at the start, and no other adapter unnoticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig, check_terms, join, terms
from fedforward.core.errors import FedForwardError
from fedforward.core.identity import ModelIdentity
from fedforward.core.layout import Layout
from fedforward.core.steps import Probe, Steps, Update
from fedforward.messages.envelope import difference
from fedforward.models.adapters import read_adapter
from fedforward.models.lora import LoraModel
from fedforward.training import replay
from tests.conftest import DEMO_MODEL
from tests.models.test_models import batch, hugging_face_loss, lora, plan

Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]
Make = Callable[..., Any]


def saved_adapter(network: Any, path: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter of PEFT's own with random factors, as a folder."""
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    torch.manual_seed(seed)
    adapted = get_peft_model(network, LoraConfig(**options | {"task_type": "CAUSAL_LM"} | settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(path)
    return path


def change(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def begun(network: Any, folder: Path, **options: Any) -> LoraModel:
    given: dict[str, Any] = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "up_proj"]}
    return LoraModel(
        network, plan=plan(), run_seed=3, adapter=read_adapter(str(folder)), **given | options
    )


def of_peft(network: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(network, folder).eval()


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"use_rslora": True}, {}),
        ({"lora_dropout": 0.5}, {}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}, {}),
        ({"target_modules": "all-linear"}, {"targets": "all-linear"}),
        ({"layers_to_transform": [1]}, {"blocks": [1]}),
        ({}, {"factors": "B"}),
        ({"target_modules": r".*\.(q_proj|up_proj)"}, {}),
    ],
)
def test_the_start_is_that_of_peft(
    tiny_network: Make, tmp_path: Path, settings: dict[str, Any], options: dict[str, Any]
) -> None:
    folder = saved_adapter(tiny_network(), tmp_path / "adapter", **settings)
    expected = hugging_face_loss(of_peft(tiny_network(), folder), batch())
    model = begun(tiny_network(), folder, **options)
    assert hugging_face_loss(tiny_network(), batch()) != pytest.approx(expected, rel=1e-4)
    (found,) = model.evaluate([Probe(batch())])
    assert found.mean == pytest.approx(expected, rel=2e-6)
    model.save(tmp_path / "again")
    one, other = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    again = of_peft(tiny_network(), tmp_path / "again")
    assert hugging_face_loss(again, batch()) == pytest.approx(expected, rel=1e-6)
    kept = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert {key: kept[key] for key in settings if "pattern" in key or "use" in key} == {
        key: value for key, value in settings.items() if "pattern" in key or "use" in key
    }
    assert kept["lora_dropout"] == settings.get("lora_dropout", 0.0)


def test_dropout_that_is_not_applied_is_said(
    tiny_network: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved_adapter(tiny_network(), tmp_path / "adapter")
    read_adapter(str(folder))
    assert not caplog.messages
    read_adapter(str(change(folder, lora_dropout=0.1)))
    assert any("lora_dropout = 0.1" in message for message in caplog.messages)


def test_the_base_of_a_run_is_the_adapter(tiny_network: Make, tmp_path: Path) -> None:
    folder = saved_adapter(tiny_network(), tmp_path / "adapter")
    model = begun(tiny_network(), folder)
    digest = model.digest()
    assert digest != lora(tiny_network(), rank=4, targets=["q_proj", "up_proj"]).digest()
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    assert model.digest() != digest
    model.reset()
    assert model.digest() == digest
    other = saved_adapter(tiny_network(), tmp_path / "other", seed=1)
    assert begun(tiny_network(), other).adapter_digest != model.adapter_digest
    assert begun(tiny_network(), folder).adapter_digest == model.adapter_digest
    change(folder, use_rslora=True)
    assert begun(tiny_network(), folder).adapter_digest != model.adapter_digest


def test_narrow_tensors_and_pickles_are_read(tiny_network: Make, tmp_path: Path) -> None:
    folder = saved_adapter(tiny_network(), tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(narrow, file)
    expected = hugging_face_loss(of_peft(tiny_network(), folder), batch())
    (found,) = begun(tiny_network(), folder).evaluate([Probe(batch())])
    assert found.mean == pytest.approx(expected, rel=2e-6)
    digest = read_adapter(str(folder)).digest
    torch.save(narrow, folder / "adapter_model.bin")
    file.unlink()
    assert read_adapter(str(folder)).digest == digest


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({}, {"rank": 8}, ["lora.rank = 8", "Set lora.rank = 4", '["q_proj", "up_proj"]']),
        ({}, {"rank": 8, "alpha": 1.0}, ["Set lora.rank = 4 and lora.alpha = 8.0"]),
        ({}, {"targets": "all-linear"}, ["'all-linear'", "lacks model.layers.0.mlp.down_proj"]),
        ({}, {"targets": ["q_proj"]}, ["has model.layers.0.mlp.up_proj beside", '"up_proj"]']),
        ({"layers_to_transform": [1]}, {}, ["lacks model.layers.0", "Set model.blocks = [1], and"]),
        ({}, {"blocks": [1]}, ["has model.layers.0", "Set model.blocks = [0, 1], and"]),
        (
            {"layers_to_transform": [1]},
            {"targets": ["q_proj"]},
            ['Set lora.targets = ["q_proj", "up_proj"] and model.blocks = [1]'],
        ),
        ({"use_dora": True}, {}, ["use_dora = True", "Merge it into its base"]),
        ({"bias": "lora_only"}, {}, ["bias = 'lora_only'"]),
        ({"lora_bias": True}, {}, ["lora_bias = True"]),
        ({"modules_to_save": ["lm_head"]}, {}, ["modules_to_save = ['lm_head']"]),
        ({"trainable_token_indices": [1, 2]}, {}, ["trainable_token_indices"]),
        ({"init_lora_weights": "pissa"}, {}, ["init_lora_weights = 'pissa'"]),
    ],
)
def test_what_does_not_fit_is_said(
    tiny_network: Make,
    tmp_path: Path,
    settings: dict[str, Any],
    options: dict[str, Any],
    words: list[str],
) -> None:
    made = {key: value for key, value in settings.items() if key == "layers_to_transform"}
    folder = change(saved_adapter(tiny_network(), tmp_path / "adapter", **made), **settings)
    with pytest.raises(FedForwardError) as caught:
        begun(tiny_network(), folder, **options)
    for word in [f"model.adapter = {str(folder)!r}", *words]:
        assert word in str(caught.value)


def test_the_adapter_of_another_base(tiny_network: Make, tmp_path: Path) -> None:
    folder = saved_adapter(tiny_network(), tmp_path / "adapter")
    change(folder, base_model_name_or_path="some/base")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: torch.zeros(4, 64)}, file)
    with pytest.raises(FedForwardError, match=r"shape \[4, 64\] there .* made for \('some/base'\)"):
        begun(tiny_network(), folder)


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"abc" * 100)


def _not_finite(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor / 0 for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda f: (f / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "cannot be read"),
        (lambda f: change(f, peft_type="IA3"), "peft_type = 'IA3'"),
        (lambda f: change(f, r="four"), "r = 'four'"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (_truncate, "adapter_model.safetensors cannot be read"),
        (_pickle, "adapter_model.bin"),
        (_not_finite, "not finite"),
    ],
)
def test_a_damaged_adapter_is_one_sentence(
    tiny_network: Make, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    folder = saved_adapter(tiny_network(), tmp_path / "adapter")
    damage(folder)
    with pytest.raises(FedForwardError, match=words) as caught:
        read_adapter(str(folder))
    assert str(caught.value).startswith(f"model.adapter = {str(folder)!r}")


def test_a_run_goes_on_from_the_adapter_of_another(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    first = carry_out(configure(), tmp_path / "first")
    folder = tmp_path / "first/adapter"
    settings = {"model__adapter": str(folder), "method__mu": 2e-2}
    short, whole = (configure(federation__rounds=n, **settings) for n in (2, 3))
    second = carry_out(short, tmp_path / "second")
    assert second["heldout_loss"]["start"] == pytest.approx(first["heldout_loss"]["end"], rel=1e-6)
    result = replay.verify(tmp_path / "second")
    assert result.saved and result.differences == []
    replay.export(tmp_path / "second", tmp_path / "out")
    one, other = (
        (f / "adapter_model.safetensors").read_bytes()
        for f in (tmp_path / "second/adapter", tmp_path / "out")
    )
    assert one == other
    resumed = carry_out(whole, tmp_path / "second", resume=True)
    unbroken = carry_out(whole, tmp_path / "whole")
    assert resumed["state_digest"] == unbroken["state_digest"]
    assert resumed["ledger_digest"] == unbroken["ledger_digest"]

    shutil.copytree(folder, tmp_path / "moved")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[max(tensors)].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    for use in (
        lambda: replay.verify(tmp_path / "second"),
        lambda: replay.export(tmp_path / "second", tmp_path / "merged", merge=True),
        lambda: carry_out(configure(federation__rounds=4, **settings), tmp_path / "whole", True),
    ):
        with pytest.raises(FedForwardError, match=r"\(model\.adapter\) is another"):
            use()
    found = replay.verify(tmp_path / "second", adapter=str(tmp_path / "moved"))
    assert found.saved and found.differences == []


def test_other_sites_notice_another_adapter() -> None:
    mine, others = (
        ModelIdentity(Layout.of({"w": (2,)}), "base", (), 8, "tokenizer", adapter)
        for adapter in ("one", "other")
    )
    assert difference(mine, mine) == ""
    assert "model.adapter" in difference(mine, others)


def test_each_site_names_the_adapter_itself() -> None:
    whole: dict[str, Any] = {"model": {"path": "m", "adapter": "a"}, "data": {"source": "d"}}
    with pytest.raises(FedForwardError, match=r"model\.adapter = 'a': each site"):
        check_terms(validate(whole), "run.toml")
    del whole["model"]["adapter"]
    given = terms(validate(whole))
    assert "adapter" not in given["model"]
    site = SiteConfig.model_validate(
        {"model": {"path": "b", "adapter": "c"}, "data": whole["data"]}
    )
    assert join(given, site).model.adapter == "c"


def test_full_tuning_has_no_adapter() -> None:
    whole = {"model": {"path": "m", "adapter": "a", "tune": "full"}, "data": {"source": "d"}}
    with pytest.raises(FedForwardError, match=r"model: adapter = 'a' .* tune = 'lora'"):
        validate(whole)


def test_the_public_face_takes_one(tmp_path: Path) -> None:
    model = LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu", seed=1)
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    model.save(tmp_path / "adapter")
    again = LoraModel.from_pretrained(
        DEMO_MODEL, rank=2, device="cpu", seed=2, adapter=tmp_path / "adapter"
    )
    assert again.digest() == model.digest()
    assert again.settings["model"]["adapter"] == str(tmp_path / "adapter")


def test_a_classifier_goes_on_with_its_head(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    rows = [(f"a {word} film, number {n}", word) for n in range(12) for word in ("good", "bad")]
    file = tmp_path / "reviews.jsonl"
    file.write_text("".join(json.dumps({"text": t, "label": w}) + "\n" for t, w in rows))
    settings: dict[str, Any] = {
        "model__head": "classification",
        "data__source": str(file),
        "data__prompt": "{text}",
        "data__answer": "{label}",
        "method__learning_rate": 1e-3,
    }
    first = carry_out(configure(**settings), tmp_path / "first")
    adapter = str(tmp_path / "first/adapter")
    again = carry_out(configure(model__adapter=adapter, **settings), tmp_path / "again")
    assert again["heldout_loss"]["start"] == pytest.approx(first["heldout_loss"]["end"], rel=1e-6)
    result = replay.verify(tmp_path / "again")
    assert result.saved and result.differences == []
