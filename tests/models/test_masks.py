"""Masks from sensitivity: the coordinates of the largest gradients, in a file that all have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.config.schema import Config
from fedforward.config.template import to_toml
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe, Steps, Update
from fedforward.directions import Distribution, ops
from fedforward.federation.ledger import Ledger
from fedforward.models.base import CausalModel
from fedforward.models.full import FullModel
from fedforward.models.masks import COMMAND, KEY, KIND, mask_of, random_mask, sensitivity_mask
from fedforward.models.pinned_files import PinnedFile, pinned, read_pinned
from fedforward.training import replay
from tests.models.test_models import PERTURBATION, TRAJECTORY, batch, lora, plan
from tests.support.command_line import command
from tests.support.configurations import content, refusal

Make = Callable[..., Any]
Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]
BATCHES = [batch(seed, rows=1) for seed in range(3)]


def built(network: Any, tune: str, trajectory: str = "recompute", **options: Any) -> CausalModel:
    if tune == "full":
        return FullModel(network, plan=plan(2, trajectory), **options)
    return lora(network, plan=plan(2), **options)


def gradients(model: CausalModel) -> np.ndarray:
    """Σ g² over the batches, in the layout's order, by plain backpropagation."""
    parameters = {p.data_ptr(): p for p in model.tuned_parameters()}
    own = [parameters[tensor.data_ptr()].requires_grad_(True) for tensor in model.tensors.values()]
    total = 0.0
    for data in BATCHES:
        parts = torch.autograd.grad(model.loss(data), own)
        total = total + torch.cat([part.float().view(-1) for part in parts]) ** 2
    for parameter in own:
        parameter.requires_grad_(False)
    return np.asarray(total)


@pytest.mark.parametrize(("tune", "density"), [("full", 0.01), ("lora", 0.02)])
def test_the_mask_has_the_largest_gradients(tiny_network: Make, tune: str, density: float) -> None:
    model = built(tiny_network(), tune)
    made = sensitivity_mask(model, BATCHES, density)
    masks = mask_of(made, model)
    chosen = torch.cat([masks[name].view(-1) for name in model.layout.names]).numpy()
    squares = gradients(model)
    assert chosen.sum() == round(density * len(squares))
    assert squares[chosen].min() >= squares[~chosen].max()
    assert squares[chosen].mean() > 10 * squares.mean()
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert sensitivity_mask(built(tiny_network(), tune), BATCHES, density).digest == made.digest


def test_what_has_no_gradient_stays(tiny_network: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A has none while B is 0, so a mask of all coordinates has those of B."""
    model = built(tiny_network(), "lora")
    masks = mask_of(sensitivity_mask(model, BATCHES, 1.0), model)
    assert not any(mask.any() for name, mask in masks.items() if ".lora_A." in name)
    assert any("the gradient of the others is 0" in message for message in caplog.messages)


@pytest.mark.parametrize("distribution", list(Distribution))
@pytest.mark.parametrize(
    ("tune", "dtype", "trajectory"),
    [
        ("lora", "float32", "recompute"),
        ("full", "float32", "recompute"),
        ("full", "float32", "cache"),
        ("full", "bfloat16", "cache"),
    ],
)
def test_a_list_has_the_bits_of_whole_tiles(
    tiny_network: Make,
    monkeypatch: pytest.MonkeyPatch,
    distribution: Distribution,
    tune: str,
    dtype: str,
    trajectory: str,
) -> None:
    """Losses and weights, with steps of all blocks and of one."""
    found = []
    for share in (1.0, 0.0):
        monkeypatch.setitem(ops.SPARSE, distribution, share)
        model = built(tiny_network(dtype), tune, trajectory, distribution=distribution)
        model.masks = random_mask(model.tensors, model.layout, 0.05, 3)
        assert bool(model.free_coordinates()) == (share == 1)
        rows = np.zeros((len(model.layout.blocks), 2), np.float32)
        rows[-1] = 0.05
        of_a_block = Steps(np.array([8, 9], np.uint64), rows)
        probes = [
            Probe(batch(), TRAJECTORY, sign) for sign in (PERTURBATION, Steps.of([11], [-0.05]))
        ]
        probes += [Probe(batch(), TRAJECTORY, of_a_block), Probe(batch(), of_a_block, PERTURBATION)]
        losses = [r.sums.tobytes() for r in model.evaluate(probes)]
        model.commit([Update(TRAJECTORY, 1), Update(of_a_block, 2, decay=0.9)])
        losses += [r.sums.tobytes() for r in model.evaluate(probes)]
        found.append((losses, model.digest()))
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 8, "every probe has a loss of its own"


def test_a_tensor_without_a_free_coordinate_is_not_made(tiny_network: Make) -> None:
    model = built(tiny_network(), "full")
    model.masks = {name: torch.zeros_like(t, dtype=torch.bool) for name, t in model.tensors.items()}
    (still,) = model.evaluate([Probe(batch())])
    name = "model.layers.1.mlp.up_proj.weight"
    model.masks = {**model.masks, name: torch.ones_like(model.masks[name])}
    assert len(model.free_coordinates()[name]) > 0
    before = {n: t.clone() for n, t in model.tensors.items()}
    (moved,) = model.evaluate([Probe(batch(), TRAJECTORY)])
    model.commit([Update(TRAJECTORY, 0)])
    assert [n for n, t in model.tensors.items() if not torch.equal(t, before[n])] == [name]
    assert moved.mean != pytest.approx(still.mean, rel=1e-5)


def read(path: Path) -> PinnedFile:
    return read_pinned(str(path), KIND, KEY, COMMAND)


def test_a_mask_of_another_model(tiny_network: Make, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(sensitivity_mask(built(tiny_network(), "lora"), BATCHES, 0.01).data)
    given = f"method.mask_file = {str(file)!r}"
    with pytest.raises(FedForwardError, match="made for a base with other weights") as caught:
        mask_of(read(file), built(tiny_network("bfloat16"), "lora"))
    assert str(caught.value).startswith(given)
    for other in (built(tiny_network(), "full"), built(tiny_network(), "lora", rank=4)):
        with pytest.raises(FedForwardError, match="made for other tuned tensors") as caught:
            mask_of(read(file), other)
        assert str(caught.value).startswith(given)
    with pytest.raises(FedForwardError, match="holds no initial A of a run"):
        read_pinned(str(file), "initial A", "lora.init_file", "fedforward align")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(FedForwardError, match="cannot be read"):
        read(file)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__mask_file": "m"}, ["mask_file = 'm'", "mask = 'none'", "leave mask_file out"]),
        ({"method__mask": "top"}, ["method.mask = 'top'", "'file'"]),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], words: list[str]) -> None:
    said = refusal(content(**changes))
    for word in words:
        assert word in said


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_run_with_a_mask_of_a_file(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, tune: str
) -> None:
    file, toml = tmp_path / "m.safetensors", tmp_path / "configuration.toml"
    settings: dict[str, Any] = {"model__tune": tune, "data__public_rows": 4}
    toml.write_text(to_toml(configure(**settings)))
    if tune == "lora":
        refused = command("mask", toml, "lora.init=aligned", "--out", file)
        refused.refused("without lora.init_file", "fedforward align")
    done = command("mask", toml, "method.density=0.01", "--out", file)
    assert done.code == 0, done
    assert read(file).digest in done.out and read(file).made_for["rows"] == 4
    settings |= {"method__mask": "file", "method__learning_rate": 1e-3}
    with pytest.raises(FedForwardError, match=r"needs method\.mask_file"):
        carry_out(configure(**settings), tmp_path / "without")
    assert not list((tmp_path / "without").iterdir())
    settings |= {"method__mask_file": str(file)}
    short, whole = (configure(federation__rounds=n, **settings) for n in (2, 3))
    carry_out(short, tmp_path / "run")
    header = Ledger(tmp_path / "run/ledger.sqlite").header
    assert header["mask"] == ["file", read(file).digest]
    resumed = carry_out(whole, tmp_path / "run", resume=True)
    unbroken = carry_out(whole, tmp_path / "whole")
    assert resumed["state_digest"] == unbroken["state_digest"]
    found = replay.verify(tmp_path / "run")
    assert found.saved and found.differences == []
    moved = file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(FedForwardError, match="no such file"):
        replay.verify(tmp_path / "run")
    done = command("verify", tmp_path / "run", "--mask-file", moved)
    assert done.code == 0 and "bit-identical" in done.out
    made = read(moved)
    other = {name: places[:-1] for name, places in made.tensors.items()}
    file.write_bytes(pinned(KIND, other, made.made_for).data)
    with pytest.raises(FedForwardError, match=r"the mask \(method\.mask"):
        replay.verify(tmp_path / "run")
