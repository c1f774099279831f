"""Aligned adapters: the A that inputs give, the same file for all, and no other one unnoticed."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("pydantic", reason="the configuration needs pydantic")

from fedforward.config.schema import Config
from fedforward.config.template import to_toml
from fedforward.core.errors import FedForwardError
from fedforward.core.steps import Probe, Steps, Update
from fedforward.directions import Distribution
from fedforward.federation.ledger import Ledger
from fedforward.models import aligned, loading
from fedforward.models.aligned import align
from fedforward.models.lora import LoraModel, random_factors
from fedforward.models.pinned_files import PinnedFile, pinned, read_pinned
from fedforward.models.principal import principal_directions
from fedforward.training import replay
from tests.conftest import DEMO_MODEL
from tests.models.test_classification import classifier
from tests.models.test_models import (
    PERTURBATION,
    TRAJECTORY,
    batch,
    displace,
    hugging_face_loss,
    lora,
)
from tests.models.test_probing import make
from tests.support.command_line import command
from tests.support.configurations import content, refusal

Make = Callable[..., Any]
Configure = Callable[..., Config]
CarryOut = Callable[..., dict[str, Any]]


def texts(count: int = 6, shortest: int = 9) -> list[Any]:
    random = np.random.default_rng(0)
    return [random.integers(3, 97, shortest + 4 * (place % 3)) for place in range(count)]


def inputs(network: Any, given: list[Any], whole: bool = False) -> dict[str, Any]:
    """What each linear layer is given over texts, each alone, float64 [tokens, inputs]."""
    seen: dict[str, list[Any]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(
                args[0].reshape(-1, args[0].shape[-1]).double().numpy()
            )
        )
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    with torch.inference_mode():
        for text in given:
            network(input_ids=torch.from_numpy(text if whole else text[:-1])[None])
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def module_of(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")


def check_rows(found: Any, x: Any, initial: Any, rel: float = 1e-5) -> None:
    """Whitened, as large as the random A, and in the space of the largest eigenvectors."""
    rank = len(found)
    covariance = x.T @ x
    a = found.double().numpy()
    own = a @ covariance @ a.T
    total = np.trace(initial.double().numpy() @ covariance @ initial.double().numpy().T)
    assert own == pytest.approx(np.eye(rank) * total / rank, abs=rel * total)
    _, vectors = np.linalg.eigh(covariance)
    top = vectors[:, -rank:]
    inside = a @ top @ top.T
    assert inside == pytest.approx(a, abs=rel * np.abs(a).max())
    assert (np.take_along_axis(a, np.abs(a).argmax(axis=1)[:, None], axis=1) > 0).all()


@pytest.mark.parametrize("options", [{}, {"blocks": [1]}, {"targets": ["q_proj", "down_proj"]}])
def test_rows_are_whitened_principal_directions(
    tiny_network: Make, options: dict[str, Any]
) -> None:
    x = inputs(tiny_network(), texts())
    model = lora(tiny_network(), run_seed=3, **options)
    initial = random_factors(model)
    made = align(model, texts())
    assert made.tensors.keys() == initial.keys()
    for name, found in made.tensors.items():
        assert found.dtype is torch.float32
        check_rows(found, x[module_of(name)], initial[name])
    assert made.digest == align(model, texts()).digest
    assert made.made_for["rows"] == 6 and made.made_for["tokens"] == sum(map(len, texts()))


def test_layers_in_parts_have_the_same_a(
    tiny_network: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lora(tiny_network())
    whole = align(model, texts())
    monkeypatch.setattr(aligned, "MOST_BYTES", 8 * 32**2)
    assert align(model, texts()).digest == whole.digest


def test_inputs_that_are_shared_now_and_then_are_not_mixed_up(tiny_network: Make) -> None:
    """Keys see the queries' inputs in some texts and their own in others."""
    model = lora(tiny_network(), targets=["q_proj", "k_proj"])
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    layer = model.network.model.layers[0].self_attn.k_proj
    layer.register_forward_pre_hook(
        lambda _, args: (2 * args[0],) if args[0].shape[1] > 10 else None
    )
    seen: list[Any] = []
    layer.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, 32).double().numpy())
    )
    made = align(model, texts())
    check_rows(made.tensors[key], np.concatenate(seen[-6:]), random_factors(model)[key])


def test_rows_at_places_tell_texts_apart(tiny_network: Make) -> None:
    """The top directions of the inputs at one token of each text around their mean, in numpy."""
    given, places = texts(12), [5, 3, 6, 4, 2, 7, 1, 5, 4, 3, 6, 2]
    every = inputs(tiny_network(), given)
    alone = [inputs(tiny_network(), [text]) for text in given]
    model = lora(tiny_network(), run_seed=3)
    initial = random_factors(model)
    made = align(model, given, places)
    assert made.made_for["positions"] == "last of each prompt"
    assert made.digest != align(model, given).digest
    for name, found in made.tensors.items():
        module = module_of(name)
        chosen = np.array([part[module][place] for part, place in zip(alone, places, strict=True)])
        away = chosen - chosen.mean(axis=0)
        values, vectors = np.linalg.eigh(away.T @ away / len(away))
        rank, a = len(found), found.double().numpy()
        top, variances = vectors[:, ::-1][:, :rank].T, values[::-1][:rank]
        # As large as the random A on the inputs at all tokens.
        x, random = every[module], initial[name].double().numpy()
        total = np.trace(random @ (x.T @ x / len(x)) @ random.T)
        wanted = top * np.sqrt(total / rank / variances)[:, None]
        signs = np.sign((wanted * a).sum(axis=1))
        assert a == pytest.approx(wanted * signs[:, None], abs=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("shortest", [3, 1])
def test_a_text_with_few_directions(
    tiny_network: Make, caplog: pytest.LogCaptureFixture, shortest: int
) -> None:
    """Three tokens, of which two are inputs, and eight rows: the others are random ones."""
    model = lora(tiny_network(), rank=8)
    if shortest == 1:
        with pytest.raises(FedForwardError, match="No text with two tokens"):
            align(model, texts(1, shortest))
        return
    x = inputs(tiny_network(), texts(1, shortest))
    initial = random_factors(model)
    made = align(model, texts(1, shortest))
    assert any("fewer directions than lora.rank = 8" in m for m in caplog.messages)
    for name, found in made.tensors.items():
        a, given = found.double().numpy(), x[module_of(name)]
        check_rows(found[:2], given, initial[name])
        assert np.abs(given @ a[2:].T).max() < 1e-5
        assert np.linalg.matrix_rank(a) == 8
        rest = initial[name].double().numpy()[2:]
        assert a[2:] == pytest.approx(rest - rest @ np.linalg.pinv(given) @ given, abs=1e-6)


def test_inputs_of_nothing_leave_the_random_a() -> None:
    initial = np.ones((2, 3))
    zero = np.zeros((3, 3))
    found = aligned.aligned_rows(*principal_directions(zero, 2), zero, initial)
    assert (found == initial).all()


def begun(network: Any, made: PinnedFile, **options: Any) -> LoraModel:
    model = lora(network, **options)
    model.begin_with(made)
    return model


@pytest.mark.parametrize("factors", ["both", "B"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_begins_with_it_and_peft_loads_it(
    family: str, factors: str, tmp_path: Path
) -> None:
    """The loss is the base's; probes move it as they move PEFT's; what is saved has its A."""
    from peft import PeftModel

    base = hugging_face_loss(make(family), batch())
    made = align(lora(make(family), factors=factors), texts())
    model = begun(make(family), made, factors=factors)
    (plain,) = model.evaluate([Probe(batch())])
    assert plain.mean == pytest.approx(base, rel=1e-5)
    digest = model.digest()
    assert (digest == lora(make(family), factors=factors).digest()) == (factors == "B")
    model.commit([Update(Steps.of([1], [0.05]), 0)])
    (moved,) = model.evaluate([Probe(batch(), TRAJECTORY, PERTURBATION)])
    displace(model.tensors, model.layout, TRAJECTORY + PERTURBATION, Distribution.GAUSSIAN)
    assert moved.mean == pytest.approx(hugging_face_loss(model.network, batch()), rel=1e-5)
    assert moved.mean != pytest.approx(base, rel=1e-3)
    model.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    same = [torch.equal(saved[name], a) for name, a in made.tensors.items()]
    assert all(same) if factors == "B" else not any(same)
    loaded = PeftModel.from_pretrained(make(family), tmp_path / "adapter").eval()
    assert hugging_face_loss(loaded, batch()) == pytest.approx(moved.mean, rel=1e-5)
    model.reset()
    assert model.digest() == digest


def test_an_aligned_a_of_half_precision(tiny_network: Make) -> None:
    x = inputs(tiny_network("bfloat16"), texts())
    model = lora(tiny_network("bfloat16"))
    initial = random_factors(model)
    made = align(model, texts())
    for name, found in made.tensors.items():
        assert found.dtype is torch.float32
        check_rows(found, x[module_of(name)], initial[name])
    assert begun(tiny_network("bfloat16"), made).initial_a_digest == made.digest


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_classifier_sees_all_tokens_of_a_text(kind: str) -> None:
    x = inputs(classifier(kind), texts(), whole=True)
    model = lora(classifier(kind))
    initial = random_factors(model)
    made = align(model, texts())
    for name, found in made.tensors.items():
        # A pooling head sees one vector of each text.
        if "layer" in name:
            check_rows(found, x[module_of(name)], initial[name], rel=1e-4)
    again = begun(classifier(kind), made)
    digest = again.digest()
    again.commit([Update(Steps.of([1], [0.05]), 0)])
    again.reset()
    assert again.digest() == digest


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (pip install 'fedforward[quantization]')",
)
def test_a_quantised_base(tmp_path: Path, tiny_network: Make) -> None:
    tiny_network(vocabulary=958).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, tmp_path / name)

    def packed() -> Any:
        return loading.load(str(tmp_path), "float32", "cpu", quantization="nf4")[0]

    made = align(lora(packed()), texts())
    model = begun(packed(), made)
    (plain,) = model.evaluate([Probe(batch())])
    (base,) = lora(packed()).evaluate([Probe(batch())])
    assert plain.mean == pytest.approx(base.mean, rel=1e-6)
    with pytest.raises(FedForwardError, match="made for a base with other weights"):
        lora(loading.load(str(tmp_path), "float32", "cpu")[0]).begin_with(made)


# ---- files ---------------------------------------------------------------------------------------


def read(path: Path) -> PinnedFile:
    return read_pinned(str(path), aligned.KIND, aligned.KEY, aligned.COMMAND)


def written(model: LoraModel, path: Path) -> Path:
    path.write_bytes(align(model, texts()).data)
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, ["lora.rank = 4 does not fit", "made for lora.rank = 3. Set that, or make"]),
        (
            {"targets": ["q_proj"]},
            ['lora.targets = ["q_proj"] does not fit', "has model.layers.0", '"all-linear", or'],
        ),
        ({"blocks": [1]}, ["model.blocks = [1] does not fit", 'Set model.blocks = "all", or make']),
    ],
)
def test_an_a_of_other_adapters(
    tiny_network: Make, tmp_path: Path, options: dict[str, Any], words: list[str]
) -> None:
    file = written(lora(tiny_network()), tmp_path / "a.safetensors")
    with pytest.raises(FedForwardError) as caught:
        begun(tiny_network(), read(file), **options)
    for word in [f"lora.init_file = {str(file)!r}", *words]:
        assert word in str(caught.value)


def test_an_a_of_fewer_adapters(tiny_network: Make, tmp_path: Path) -> None:
    file = written(lora(tiny_network(), blocks=[1]), tmp_path / "a.safetensors")
    with pytest.raises(FedForwardError, match=r"lacks model\.layers\.0.*Set model\.blocks = \[1\]"):
        begun(tiny_network(), read(file))


def test_an_a_of_another_base(tiny_network: Make, tmp_path: Path) -> None:
    file = written(lora(tiny_network()), tmp_path / "a.safetensors")
    with pytest.raises(FedForwardError, match=r"base with other weights than this model\.path"):
        begun(tiny_network("bfloat16"), read(file))


def _not_finite(file: Path) -> None:
    made = read(file)
    file.write_bytes(
        pinned(aligned.KIND, {n: t / 0 for n, t in made.tensors.items()}, made.made_for).data
    )


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.unlink(), "no such file"),
        (_folder, "it is a folder"),
        (lambda f: f.write_bytes(f.read_bytes()[:-10]), "cannot be read"),
        (lambda f: f.write_bytes(b"abc" * 100), "cannot be read"),
        (lambda f: f.write_bytes(b""), "cannot be read"),
        (lambda f: save_file({"a": torch.zeros(1)}, f), "holds no initial A of a run"),
        (lambda f: f.write_bytes(pinned("mask", {}, {}).data), "holds no initial A of a run"),
        (_not_finite, "not finite"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tiny_network: Make, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    file = written(lora(tiny_network()), tmp_path / "a.safetensors")
    damage(file)
    with pytest.raises(FedForwardError, match=words) as caught:
        read(file)
    assert str(caught.value).startswith(f"lora.init_file = {str(file)!r}")


def test_the_same_content_is_the_same_file(tiny_network: Make) -> None:
    made = align(lora(tiny_network()), texts())
    mixed = dict(reversed(made.tensors.items()))
    assert pinned(aligned.KIND, mixed, made.made_for).data == made.data
    changed = {name: tensor.clone() for name, tensor in made.tensors.items()}
    changed[min(changed)].view(torch.uint8).view(-1)[0] ^= 1
    assert pinned(aligned.KIND, changed, made.made_for).digest != made.digest


# ---- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora__init": "pissa"}, ["lora.init = 'pissa'", "'random', 'aligned'"]),
        ({"lora__init_file": "a"}, ["init_file = 'a'", "init = 'random'"]),
        ({"lora__init": "aligned", "model__tune": "full"}, ["model.tune = 'full' has none"]),
        ({"lora__init": "aligned", "model__adapter": "b"}, ["model.adapter = 'b' has an A"]),
        ({"data__public_rows": 0}, ["public_rows = 0"]),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], words: list[str]) -> None:
    said = refusal(content(**changes))
    for word in words:
        assert word in said


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_makes_keeps_and_finds_its_a(
    configure: Configure, carry_out: CarryOut, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedforward")
    short, whole = (configure(lora__init="aligned", federation__rounds=n) for n in (2, 3))
    carry_out(short, tmp_path / "run")
    assert any("training rows of all clients" in message for message in caplog.messages)
    file = tmp_path / "run/initial_a.safetensors"
    made = read(file)
    assert Ledger(tmp_path / "run/ledger.sqlite").header["initial_a"] == made.digest
    assert made.made_for["rows"] == 42, "all that the clients have"
    found = replay.verify(tmp_path / "run")
    assert found.saved and found.differences == []
    replay.export(tmp_path / "run", tmp_path / "out")
    resumed = carry_out(whole, tmp_path / "run", resume=True)
    unbroken = carry_out(whole, tmp_path / "whole")
    assert (tmp_path / "whole/initial_a.safetensors").read_bytes() == file.read_bytes()
    assert resumed["state_digest"] == unbroken["state_digest"]
    assert resumed["ledger_digest"] == unbroken["ledger_digest"]
    plain = carry_out(configure(), tmp_path / "plain")
    assert plain["state_digest"] != unbroken["state_digest"]
    assert plain["heldout_loss"]["start"] == pytest.approx(unbroken["heldout_loss"]["start"])

    moved = shutil.move(file, tmp_path / "moved.safetensors")
    for use in (
        lambda: replay.verify(tmp_path / "run"),
        lambda: carry_out(whole, tmp_path / "run", resume=True),
    ):
        with pytest.raises(FedForwardError, match=r"initial_a\.safetensors is missing"):
            use()
    assert replay.verify(tmp_path / "run", init_file=str(moved)).differences == []
    done = command("verify", tmp_path / "run", "--init-file", moved)
    assert done.code == 0 and "bit-identical" in done.out
    other = {name: -tensor for name, tensor in made.tensors.items()}
    file.write_bytes(pinned(aligned.KIND, other, made.made_for).data)
    for use in (
        lambda: replay.verify(tmp_path / "run"),
        lambda: replay.export(tmp_path / "run", tmp_path / "second"),
        lambda: carry_out(configure(lora__init="aligned"), tmp_path / "run", resume=True),
    ):
        with pytest.raises(FedForwardError, match=r"\(lora\.init_file\) is another"):
            use()
    with pytest.raises(FedForwardError, match=r"\(lora\.init_file\) is another"):
        replay.verify(tmp_path / "plain", init_file=str(moved))


def test_a_file_gives_the_bits_of_a_run_without(
    configure: Configure, carry_out: CarryOut, rows: Path, tmp_path: Path
) -> None:
    """`fedforward align` makes the file that a run makes itself, and takes a public text."""
    made = carry_out(configure(lora__init="aligned"), tmp_path / "made")
    file = tmp_path / "configuration.toml"
    file.write_text(to_toml(configure(lora__init="aligned")))
    done = command("align", file, "--out", tmp_path / "a.safetensors")
    assert done.code == 0, done
    assert read(tmp_path / "a.safetensors").digest in done.out
    settings = {"lora__init": "aligned", "lora__init_file": str(tmp_path / "a.safetensors")}
    given = carry_out(configure(**settings), tmp_path / "given")
    assert given["state_digest"] == made["state_digest"]
    assert given["ledger_digest"] == made["ledger_digest"]
    assert not (tmp_path / "given/initial_a.safetensors").exists()
    assert replay.verify(tmp_path / "given").differences == []
    command("align", file, "--out", tmp_path / "a.safetensors").refused("exists already")

    public = shutil.copy(rows, tmp_path / "public.jsonl")
    server = tmp_path / "server.toml"
    server.write_text(
        "\n".join(line for line in file.read_text().splitlines() if "source" not in line).replace(
            f'path = "{DEMO_MODEL}"', ""
        )
    )
    out = ["--out", tmp_path / "b.safetensors"]
    command("align", server, *out).refused("no model.path")
    path = f"model.path={DEMO_MODEL}"
    command("align", server, path, *out).refused("neither data.public nor data.source")
    gone = f"data.public={tmp_path / 'gone.jsonl'}"
    command("align", server, path, gone, *out).refused("data.public = ", "gone.jsonl")
    gone = f"data.public={tmp_path / 'gone.txt'}"
    command("align", server, path, gone, *out).refused("data.public = ", "no such file")
    assert not (tmp_path / "b.safetensors").exists()
    done = command("align", server, path, f"data.public={public}", "data.public_rows=5", *out)
    assert done.code == 0, done
    assert read(tmp_path / "b.safetensors").made_for["rows"] == 5
    text = tmp_path / "public.txt"
    text.write_text("Some plain words, as anyone may read them. " * 200)
    settings = [path, f"data.public={text}", "data.public_rows=3"]
    done = command("align", server, *settings, "--out", tmp_path / "c.safetensors")
    assert done.code == 0, done
    made_for = read(tmp_path / "c.safetensors").made_for
    assert (made_for["rows"], made_for["tokens"]) == (3, 3 * 64)


def test_the_public_face_takes_one(tmp_path: Path) -> None:
    model = LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu")
    file = written(model, tmp_path / "a.safetensors")
    again = LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu", init_file=file)
    assert again.settings["lora"]["init_file"] == str(file)
    assert again.initial_a_digest == read(file).digest
    with pytest.raises(FedForwardError, match="both give the A"):
        LoraModel.from_pretrained(DEMO_MODEL, rank=2, device="cpu", init_file=file, adapter="a")


def test_a_classifier_is_aligned_by_a_run(
    configure: Configure, carry_out: CarryOut, tmp_path: Path
) -> None:
    lines = [(f"a {word} film, number {n}", word) for n in range(12) for word in ("good", "bad")]
    file = tmp_path / "reviews.jsonl"
    file.write_text("".join(json.dumps({"text": t, "label": w}) + "\n" for t, w in lines))
    settings: dict[str, Any] = {
        "model__head": "classification",
        "lora__init": "aligned",
        "data__source": str(file),
        "data__prompt": "{text}",
        "data__answer": "{label}",
        "data__public": str(file),
        "data__public_rows": 7,
        "method__learning_rate": 1e-4,
    }
    carry_out(configure(**settings), tmp_path / "run")
    assert read(tmp_path / "run/initial_a.safetensors").made_for["rows"] == 7
    found = replay.verify(tmp_path / "run")
    assert found.saved and found.differences == []
