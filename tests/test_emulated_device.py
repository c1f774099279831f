"""Code for accelerators on a machine without one; see `tests.support.emulated_device`.

The emulated device has the CPU's arithmetic, so that whatever runs on it must have the CPU's bits.
"""

import gc
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedforward.core.batches import TokenBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe, ProbePlan, Update
from fedforward.directions import Distribution
from fedforward.directions import ops as kernels
from fedforward.evaluation.objectives import ClassError, ClassLoss
from fedforward.federation.ledger import Ledger
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.methods.estimators import TwoPoint
from fedforward.models import devices
from fedforward.models.base import CausalModel
from fedforward.models.blocks import transformer_blocks
from fedforward.models.choices import with_choices
from fedforward.models.full import FullModel
from fedforward.models.lm_head import Head
from fedforward.models.loading import load
from fedforward.models.masks import random_mask, small_weights_mask
from fedforward.models.offload import place_the_rest
from fedforward.planning.budgets import memory_there
from fedforward.planning.memory.calibrate import calibrate
from fedforward.planning.memory.tracker import bytes_alive, peak_bytes
from fedforward.planning.probe_grouping import fit, step_probes
from fedforward.training import activation_cache
from fedforward.training import build as experiment
from fedforward.training import replay as artefacts
from fedforward.training.run import Run
from tests.conftest import DEMO_MODEL
from tests.models import test_choices, test_classification
from tests.models.test_models import PERTURBATION, TRAJECTORY, lora, plan
from tests.models.test_offload import KINDS, build, large, life, step
from tests.models.test_probing import FAMILIES, OPPOSITE, make
from tests.support import emulated_device, sites

DEVICE = "emulated"


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the device is compiled: once for all runs, or once for this one without their cache."""
    cache = getattr(request.config, "cache", None)
    if cache is None:
        return tmp_path_factory.mktemp("emulated-device")
    folder: Path = cache.mkdir("emulated-device")
    return folder


@pytest.fixture(autouse=True)
def device(built: Path, imported_libraries: None) -> Iterator[torch.device]:
    """The device, in sight of PyTorch for one test."""
    try:
        emulated_device.load(built)
    except emulated_device.UnavailableError as error:
        pytest.skip(str(error))
    with emulated_device.shown() as device, emulated_device.plain_attention():
        yield device


@pytest.fixture
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has kernels for directions, as CUDA has."""
    monkeypatch.setattr(kernels, "kernels_of", lambda _: emulated_device.Kernels)


def there(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


# The device itself.


@pytest.mark.parametrize(
    "operation",
    [
        lambda here, away: here + away,
        lambda here, away: here.add_(away),
        lambda here, away: away.mul_(here),
        lambda here, away: torch.cat([here, away]),
        lambda here, away: torch.mm(away[:, None], here[None]),
        lambda here, away: torch.where(here > 0, away, away),
        lambda here, away: torch.add(here, here, out=away),
        lambda here, away: torch.add(away, away, out=here),
        lambda here, away: away.index_select(0, torch.tensor([0])),
        lambda here, away: nn.functional.embedding(torch.tensor([0]), away[:, None]),
        lambda here, away: torch.equal(here, away),
        lambda here, away: nn.functional.linear(here, away[None]),
    ],
)
def test_two_devices_in_one_operation_are_refused(operation: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        operation(torch.ones(2), there(1, 2))


def test_what_crosses() -> None:
    away = there(1, 2)
    assert (away * torch.tensor(3.0)).tolist() == [3, 6]
    assert away[torch.tensor([1])].tolist() == [2]
    assert away.cpu().numpy().tolist() == [1, 2] and away.sum().item() == 3
    assert torch.zeros(2).copy_(away).tolist() == [1, 2]
    assert away.copy_(torch.ones(2)).device.type == DEVICE
    for refused in (lambda: away.numpy(), lambda: np.asarray(away)):
        with pytest.raises(TypeError, match=r"Use Tensor.cpu\(\)"):
            refused()
    parameter = nn.Parameter(torch.zeros(2), requires_grad=False)
    parameter.data = away
    assert parameter.data_ptr() == away.data_ptr()
    parameter.data = parameter.data.cpu()
    assert parameter.device.type == "cpu" and parameter.tolist() == [1, 1]
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned() and not torch.ones(3).is_pinned()


def test_memory_is_counted() -> None:
    gc.collect()
    before = devices.allocated(DEVICE)
    one = torch.zeros(1000, device=DEVICE)
    view = one[10:].view(-1, 2)
    view.add_(1)
    assert devices.allocated(DEVICE) - before == 4000
    devices.reset_peak(DEVICE)
    two = one.double() + 1.0
    # Both float64 tensors were there for a moment.
    assert devices.peak_allocated(DEVICE) - before == 4000 + 8000 * 2
    assert devices.allocated(DEVICE) - before == 12000
    assert bytes_alive(DEVICE) == devices.allocated(DEVICE)
    del one, two
    assert devices.allocated(DEVICE) - before == 4000
    devices.reset_peak(DEVICE)
    assert devices.peak_allocated(DEVICE) - before == 4000
    del view
    assert devices.allocated(DEVICE) == before


def test_memory_ends() -> None:
    gc.collect()
    with emulated_device.memory(devices.allocated(DEVICE) + 5000):
        kept = torch.zeros(1000, device=DEVICE)
        assert devices.room(DEVICE) == memory_there(kept.device)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            kept + 1
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.zeros(500, device=DEVICE)
        assert torch.zeros(200, device=DEVICE).sum().item() == 0


def test_it_is_found_only_while_it_is_shown(device: torch.device) -> None:
    assert devices.accelerators() == [DEVICE]
    emulated_device.module().shown = False
    assert devices.accelerators() == []


# Directions.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distribution", list(Distribution))
@pytest.mark.parametrize("own", [False, True])
def test_a_commit_has_the_bits_of_the_cpu(
    dtype: torch.dtype, distribution: Distribution, own: bool, request: pytest.FixtureRequest
) -> None:
    """By the PyTorch reference, which is what a device without kernels has, and by its own."""
    if own:
        request.getfixturevalue("own_kernels")
    weights = (0.02 * torch.randn(5000, generator=torch.Generator().manual_seed(0))).to(dtype)
    updates = [Update(TRAJECTORY, 2**64 - 5), Update(PERTURBATION, 4, decay=0.9)]
    options: dict[str, Any] = {"first_tile": 3, "distribution": distribution}
    found = []
    for kind in ("cpu", DEVICE):
        moved = weights.to(kind, copy=True)
        changed = kernels.commit(moved, updates, **options)
        beside = torch.empty(2, 90, device=kind, dtype=dtype)
        starts = np.array([0, 2100, 4900])
        kernels.displace(
            moved, TRAJECTORY, [PERTURBATION, OPPOSITE], **options, out=beside, starts=starts
        )
        found.append((changed, moved.cpu().view(torch.uint8), beside.cpu().view(torch.uint8)))
    (changed, *bits), (other, *others) = found
    assert changed == other
    assert all(map(torch.equal, bits, others))


# Models.


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_model_is_loaded_to_the_device(tune: str, offloads: bool) -> None:
    network, _ = load(str(DEMO_MODEL), "bfloat16", DEVICE, offload=offloads)
    inside = [p for block in transformer_blocks(network) for p in block.parameters()]
    assert {p.device.type for p in inside} == {"cpu" if offloads else DEVICE}
    own = {id(p) for p in inside}
    assert {p.device.type for p in network.parameters() if id(p) not in own} == {DEVICE}
    model: CausalModel = lora(network) if tune == "lora" else FullModel(network, plan=plan())
    if offloads:
        model.offload_to_host()
        assert model.offload is not None
        assert all(waiting.is_pinned() for waiting in model.offload.moving())
    assert model.device.type == DEVICE
    assert model.head.module is not None
    on_cpu, _ = load(str(DEMO_MODEL), "bfloat16", "cpu")
    other = lora(on_cpu) if tune == "lora" else FullModel(on_cpu, plan=plan())
    assert model.base_fingerprint == other.base_fingerprint
    assert model.digest() == other.digest()


CASES = [(family, kind) for family in FAMILIES for kind in KINDS]
#: Of the many, these are in `make test`.
FEW = {"llama", "gpt2"}


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=[] if family in FEW else [pytest.mark.slow])
        for family, kind in CASES
        if not (family == "mamba" and kind.startswith("lora"))
    ],
)
def test_probes_commits_and_answers_have_the_bits_of_the_cpu(
    family: str, kind: str, offloads: bool
) -> None:
    """Steps, commits, generation, snapshots and a reset."""
    if family == "mamba" and offloads:
        # Its states are made once on the device of its blocks.
        expected = life(build(kind, family, "cpu", True))
    else:
        expected = life(build(kind, family, "cpu", False))
    assert life(build(kind, family, DEVICE, offloads)) == expected


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full cache"])
@pytest.mark.parametrize("mask", ["random", "small"])
def test_masks_have_the_bits_of_the_cpu(mask: str, kind: str, offloads: bool) -> None:
    found = []
    for place, waits in (("cpu", False), (DEVICE, offloads)):
        model = build(kind, "llama", place, waits)
        if mask == "random":
            model.masks = random_mask(model.tensors, model.layout, 0.2, 7)
        else:
            model.masks = small_weights_mask(model.tensors, 0.2)
        found.append(life(model))
    assert found[0] == found[1]


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize(
    "kind", ["llama", "bert", *(pytest.param(k, marks=pytest.mark.slow) for k in ("distilbert",))]
)
def test_classifiers_have_the_bits_of_the_cpu(kind: str, tune: str, offloads: bool) -> None:
    found = []
    for place, waits in (("cpu", False), (DEVICE, offloads)):
        network = test_classification.classifier(kind)
        if waits:
            place_the_rest(network, place)
        else:
            network.to(place)
        model: CausalModel = lora(network) if tune == "lora" else FullModel(network, plan=plan())
        if waits:
            model.offload_to_host()
        answers: list[Any] = []
        for objective in (ClassLoss(), ClassError()):
            batches = [test_classification.batch(n, n + 2, objective) for n in (1, 2)]
            probes = [Probe(batches[0], TRAJECTORY, s) for s in (PERTURBATION, OPPOSITE)]
            probes.append(Probe(batches[1], TRAJECTORY[:1], PERTURBATION))
            answers += [e.sums.tolist() for e in model.evaluate(probes)]
        model.commit([Update(TRAJECTORY, 3)])
        answers += [model.digest(), model.classify(np.array([5, 6, 7]))]
        found.append(answers)
    assert found[0] == found[1]


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full cache"])
def test_choices_have_the_bits_of_the_cpu(kind: str, offloads: bool) -> None:
    """Words of one token and longer ones, at the base and displaced; and what a trial finds."""
    found = []
    for place in ("cpu", DEVICE):
        model = build(kind, "llama", place, offloads and place == DEVICE)
        model.plan = with_choices(model, model.plan)
        sums = [model.plan.joins_choices, model.plan.most_branching]
        for lengths in (test_choices.SINGLE, test_choices.SEVERAL):
            data = test_choices.batch(test_choices.examples(lengths))
            probes = [Probe(data), Probe(data, TRAJECTORY, PERTURBATION)]
            for choices in model.choices(probes, loss=True):
                sums += [choices.sums.tobytes(), choices.losses.tobytes()]
            if not offloads:
                sums.append(float(model.loss(data).detach()))
        found.append(sums)
    assert found[0] == found[1] and found[0][0]


@pytest.mark.parametrize("offloads", [False, True])
def test_what_is_saved_and_merged_is_that_of_the_cpu(offloads: bool, tmp_path: Path) -> None:
    found = []
    for place, waits in (("cpu", False), (DEVICE, offloads)):
        model = build("lora", "llama", place, waits)
        model.commit([Update(TRAJECTORY, 3)])
        model.save(tmp_path / place)
        file = (tmp_path / place / "adapter_model.safetensors").read_bytes()
        merged = {name: tensor.cpu() for name, tensor in model.merge().named_parameters()}
        found.append((file, merged))
    (file, merged), (other_file, other) = found
    assert file == other_file
    assert merged.keys() == other.keys()
    assert all(torch.equal(merged[name], other[name]) for name in merged)


# Memory.


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["lora", "full cache", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1::2])],
)
def test_a_full_device_leaves_a_model_that_goes_on(kind: str, offloads: bool) -> None:
    """Wherever in a step memory ends, the next step has the same losses, and nothing is left."""
    model = build(kind, "llama", DEVICE, offloads)
    wanted = [e.sums.tolist() for e in step(model, ["1"])]

    def start_again() -> int:
        model.clear_cache()
        if model.offload is not None:
            model.pin_blocks(())
        gc.collect()
        return devices.allocated(DEVICE)

    now = start_again()
    peak = peak_bytes(lambda: step(model, ["1"]), DEVICE)
    for most in np.linspace(now, peak - 1, 8).astype(int).tolist():
        assert start_again() == now
        with emulated_device.memory(most), pytest.raises(torch.OutOfMemoryError) as raised:
            step(model, ["1"])
        # What the traceback holds is not left behind by the step.
        del raised
        assert [e.sums.tolist() for e in step(model, ["1"])] == wanted
    assert start_again() == now


def test_a_head_is_not_given_up_for_want_of_memory() -> None:
    """A head that cannot be looked at would be taken whole, which needs still more memory."""
    network = make("llama").to(DEVICE)
    gc.collect()
    with (
        emulated_device.memory(devices.allocated(DEVICE) + 500),
        pytest.raises(torch.OutOfMemoryError),
    ):
        Head(network)
    assert Head(network).module is not None


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize(
    "kind", ["lora", "full cache", *(pytest.param(k, marks=pytest.mark.slow) for k in ("lora B",))]
)
def test_what_a_step_takes_is_what_is_predicted(kind: str) -> None:
    """Within a hundredth, whatever else the allocator has given out to something that is no tensor.

    A prediction includes what a library holds on the device, as cuBLAS holds its workspace.
    """
    gc.collect()
    before = bytes_alive(DEVICE)
    workspace = torch.UntypedStorage(200_000, device=DEVICE)
    model = large(kind, DEVICE)
    shapes = [(1, 8), (4, 40)]
    memory = calibrate(model, shapes)
    assert memory.streams and memory.library == workspace.nbytes()
    depth = len(memory.residents)
    for count in (1, depth // 2, depth):
        active = np.array([b.isdigit() and int(b) >= depth - count for b in memory.blocks])
        for rows, length in shapes:
            tokens = np.arange(rows * length).reshape(rows, length) % 97
            probes = step_probes([TokenBatch(tokens, tokens)], 2, TwoPoint(), active)
            model.evaluate(probes)
            model.clear_cache()
            measured = peak_bytes(lambda probes=probes: model.evaluate(probes), DEVICE) - before
            model.clear_cache()
            assert memory.peak(active, rows, length) == pytest.approx(measured, rel=0.01)


@pytest.mark.usefixtures("own_kernels")
def test_the_peak_of_a_step_is_that_of_its_device() -> None:
    """The tracker of the CPU and the allocator of the device agree on the same step."""
    peaks = {}
    for place in ("cpu", DEVICE):
        gc.collect()
        before = bytes_alive(place)
        model = build("full cache", "llama", place, False)
        step(model, ["0", "1"])
        model.clear_cache()
        peaks[place] = peak_bytes(lambda model=model: step(model, ["0", "1"]), place) - before
        del model
    assert peaks[DEVICE] == pytest.approx(peaks["cpu"], rel=0.01)


@pytest.mark.usefixtures("own_kernels")
def test_a_budget_is_of_the_device() -> None:
    model = lora(make("llama").to(DEVICE), plan=ProbePlan(1, 1, "cache", 4))
    tokens = np.arange(160).reshape(4, 40) % 97
    batches = [TokenBatch(tokens, tokens)]
    with pytest.raises(FedForwardError, match=r"run\.memory_budget = 100\.00 KiB is too small"):
        fit(model, batches, 100 * 1024, 4, TwoPoint())
    model.evaluate(step_probes(batches, 3, TwoPoint()))
    model.plan = ProbePlan(3, 1, "cache", 4)
    peak = peak_bytes(lambda: model.evaluate(step_probes(batches, 3, TwoPoint())), DEVICE)
    assert fit(model, batches, peak, 4, TwoPoint()).probes_per_call == 3


# Whole runs.

ZORBA = {"method__name": "zorba", "planning__active": [2, 3]}
FULL = {"model__tune": "full"}
RUNS: dict[str, dict[str, Any]] = {
    "fedmezo": {},
    "fedmezo full cache": FULL | {"run__trajectory": "cache"},
    "fedmezo full recompute": FULL | {"run__trajectory": "recompute"},
    "upper blocks": {"model__blocks": [2]},
    "upper blocks full": FULL | {"model__blocks": [1, 2]},
    "decomfl": {"method__name": "decomfl"},
    "zorba": ZORBA,
    "zorba offload": ZORBA | {"model__offload": "host"},
    "zorba full offload": ZORBA | FULL | {"planning__active": [3, 5], "model__offload": "host"},
    "zorba measured": {
        "method__name": "zorba",
        "planning__budgets": "measured",
        "planning__weights": "sensitivity",
    },
    "fedkseed": {"method__name": "fedkseed", "method__candidates": 8},
    "fedkseed-pro full": FULL | {"method__name": "fedkseed-pro", "method__candidates": 8},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_bits_of_the_cpu(
    configure: Any, carry_out: Any, tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """Equal ledgers and states, and a run that the CPU can verify."""
    if "full" in name:
        request.getfixturevalue("own_kernels")
    summaries, ledgers = [], []
    for place in ("cpu", DEVICE):
        settings = configure(run__device=place, run__tokens_per_call=1024, **RUNS[name])
        summaries.append(carry_out(settings, tmp_path / place))
        ledgers.append(Ledger(tmp_path / place / "ledger.sqlite"))
    assert ledgers[0].length == 3
    assert ledgers[0].chain == ledgers[1].chain
    for key in ("state_digest", "ledger_digest", "heldout_loss"):
        assert summaries[0][key] == summaries[1][key]
    for ledger in ledgers:
        ledger.close()
    stored = json.loads((tmp_path / DEVICE / "plan.json").read_text())
    assert stored["device"] == DEVICE
    assert stored["keeps_activations"] == ("upper" in name)
    if name == "fedmezo":
        assert artefacts.verify(tmp_path / DEVICE).differences == []


def test_rows_that_do_not_fit_run_together(
    configure: Any, carry_out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short, "auto" does not run row after row alone; the CPU may."""
    monkeypatch.setattr(activation_cache, "available_memory", lambda: 200_000)
    for place in ("cpu", DEVICE):
        settings = configure(run__device=place, federation__rounds=1, **RUNS["upper blocks"])
        carry_out(settings, tmp_path / place)
        stored = json.loads((tmp_path / place / "plan.json").read_text())
        assert stored["keeps_activations"] == (place == "cpu")
        assert ("all rows take" in stored["not_kept"]) == (place == DEVICE)


def first_order(cache: Path, settings: Any, out: Path) -> float:
    """A run of the first-order baseline on the device; the last held-out loss."""
    emulated_device.load(cache)
    with emulated_device.shown():
        run = Run(settings, out)
        assert run.model.device.type == DEVICE
        return run.fit().heldout_loss.end


@pytest.mark.slow
def test_the_first_order_baseline_runs_on_the_device(
    configure: Any, carry_out: Any, tmp_path: Path, built: Path
) -> None:
    """In a process of its own: PyTorch counts devices once, before the first gradient."""
    options = {"method__name": "fedavg", "federation__rounds": 1, "method__mu": 1e-3}
    expected = carry_out(configure(**options), tmp_path / "cpu")["heldout_loss"]["end"]
    settings = configure(**options, run__device=DEVICE)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(first_order, built, settings, tmp_path / DEVICE).result()
    assert found == pytest.approx(expected, rel=1e-5)


def test_sites_on_different_devices_agree(tmp_path: Path) -> None:
    """A round is only counted where all sites prove the same state."""
    parties = {
        name: sites.party(tmp_path, name, run__device=place)
        for name, place in (("a", DEVICE), ("b", "cpu"), ("c", DEVICE))
    }
    settings = sites.run_toml(tmp_path, "federation.rounds=2")
    summary = sites.carry_out(settings, tmp_path / "out", sites.Direct(parties))
    tunings = [site.tuning for site in parties.values()]
    models = [tuning.replica.model for tuning in tunings if tuning is not None]
    assert [model.device.type for model in models] == [DEVICE, "cpu", DEVICE]
    assert {model.digest().hex() for model in models} == {summary["state_digest"]}


def test_a_site_whose_device_is_full_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = sites.party(tmp_path, "a", run__device=DEVICE)
    monkeypatch.setattr(site, "enroll", lambda _: torch.zeros(1000, device=DEVICE))
    with emulated_device.memory(1000):
        answer = Envelope.decode(
            site.answer(Envelope(MessageKind.HELLO, b"\0" * 8, b"{}").encode())
        )
    assert answer.kind is MessageKind.REFUSAL
    assert Refusal.decode(answer.body) == Refusal(RefusalCode.MEMORY)
    assert "Traceback" not in capsys.readouterr().err


def test_devices_that_are_not_there(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment.resolve_device(DEVICE) == DEVICE
    assert experiment.resolve_device(f"{DEVICE}:0") == f"{DEVICE}:0"
    # No other accelerator than CUDA is taken unasked.
    assert experiment.resolve_device("auto") == "cpu"
    with pytest.raises(FedForwardError, match=f"run.device = '{DEVICE}:1': there are only 1"):
        experiment.resolve_device(f"{DEVICE}:1")
    emulated_device.module().shown = False
    with pytest.raises(FedForwardError, match=f"run.device = '{DEVICE}' is not allowed"):
        experiment.resolve_device(DEVICE)
