"""Possible answers in one row: what plain PyTorch says of each answer, at displaced weights too."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedforward.core.batches import IGNORED, ChoiceBatch, JoinedRows
from fedforward.core.steps import NO_STEPS, Probe, ProbePlan, Steps
from fedforward.data.examples import Example
from fedforward.data.sampler import collate_choices, join
from fedforward.directions import Distribution
from fedforward.evaluation.objectives import Accuracy, Choice
from fedforward.models.base import CausalModel
from fedforward.models.batching import cut
from fedforward.models.choices import NO_LIMIT, with_choices
from fedforward.models.full import FullModel
from fedforward.models.grouping import settled
from tests.models.test_models import PERTURBATION, TRAJECTORY, displace, lora, plan

Make = Callable[..., Any]
SINGLE, SEVERAL = (1, 1, 1), (1, 3, 2)
OPPOSITE = Steps.of([11], [-0.05])


def examples(lengths: Sequence[int] = SINGLE, count: int = 5, seed: int = 0) -> list[Example]:
    """Prompts of several lengths with words of so many tokens."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        prompt = random.integers(3, 97, 4 + 2 * number)
        # Words must differ: of the same tokens they would be one.
        ends = np.split(random.permutation(np.arange(3, 97))[: sum(lengths)], np.cumsum(lengths))
        rows = tuple(np.concatenate((prompt, end)) for end in ends[:-1])
        right = number % len(lengths)
        made.append(Example(rows[right], len(prompt), "", rows, right))
    return made


def seams() -> list[Example]:
    """Words whose prompts end in other tokens, at different places."""
    choices = (np.array([5, 6, 7, 8]), np.array([5, 6, 9]), np.array([5, 10, 11, 12, 13]))
    return [Example(choices[1], 2, "", choices, 1, choice_prompts=(3, 2, 2)), *examples(SEVERAL)]


def of_each_answer(network: Any, data: Sequence[Example]) -> np.ndarray:
    """The summed loss of each answer's tokens, each answer alone, by plain transformers."""
    sums = []
    for example in data:
        prompts = example.choice_prompts or (example.prompt_length,) * len(example.choices)
        for choice, prompt in zip(example.choices, prompts, strict=True):
            with torch.inference_mode():
                logits = network(input_ids=torch.from_numpy(choice[None]), use_cache=False).logits
            log_p = torch.log_softmax(logits[0].double(), dim=1)
            tokens = torch.from_numpy(choice[prompt:])
            sums.append(-float(log_p[prompt - 1 : -1].gather(1, tokens[:, None]).sum()))
    return np.array(sums).reshape(len(data), -1)


def cross_entropy(sums: np.ndarray, data: Sequence[Example]) -> np.ndarray:
    right = torch.tensor([example.right for example in data])
    losses = torch.nn.functional.cross_entropy(-torch.from_numpy(sums), right, reduction="none")
    return losses.numpy()


def differences(sums: np.ndarray) -> np.ndarray:
    return sums - sums[:, :1]


def family(name: str) -> Any:
    """A tiny network with random weights; GPT-2 has a table of positions, Gemma soft caps."""
    import transformers as hf

    torch.manual_seed(0)
    same = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.1}
    heads = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    grouped = same | heads | {"num_key_value_heads": 2}
    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped)),
        "tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**grouped, tie_word_embeddings=True)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**grouped, head_dim=8)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(
            hf.Gemma2Config(**grouped, head_dim=8, final_logit_softcapping=2.0, sliding_window=40)
        ),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**grouped, sliding_window=12)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2
            )
        ),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=97,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                word_embed_proj_dim=32,
                init_std=0.2,
            )
        ),
        "bloom": lambda: hf.BloomForCausalLM(
            hf.BloomConfig(
                vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.1
            )
        ),
        "mamba": lambda: hf.MambaForCausalLM(
            hf.MambaConfig(**same, state_size=4, intermediate_size=64)
        ),
    }
    return made[name]().eval().requires_grad_(False)


def model_of(network: Any, tune: str, how: ProbePlan | None = None) -> CausalModel:
    how = how or plan(4)
    return lora(network, plan=how) if tune == "lora" else FullModel(network, plan=how)


def batch(data: Sequence[Example]) -> ChoiceBatch:
    return collate_choices(data, joined=True, most_branching=NO_LIMIT)


FAMILIES = ("llama", "tied", "qwen3", "gemma2", "gpt2", "opt")


def test_a_row_of_single_words_is_the_prompt() -> None:
    data = examples()
    joined = batch(data).rows
    assert isinstance(joined, JoinedRows) and joined.single and not joined.branches
    assert joined.tokens.shape == (5, 12)
    for row, example in zip(joined.tokens, data, strict=True):
        assert row[: example.prompt_length].tolist() == (
            example.tokens[: example.prompt_length].tolist()
        )
    assert joined.places.tolist() == [[[e.prompt_length - 1]] * 3 for e in data]
    assert joined.targets[:, :, 0].tolist() == [[int(c[-1]) for c in e.choices] for e in data]


def test_longer_words_branch_from_the_prompt() -> None:
    """The tree of a row, read by hand."""
    (row,) = (join(seams()[:1]),)
    assert row.branches and not row.single
    assert row.tokens.tolist() == [[5, 6, 7, 6, 10, 11, 12]]
    assert row.positions.tolist() == [[0, 1, 2, 1, 1, 2, 3]]
    assert row.endings.tolist() == [[0, 1, 1, 2, 3, 3, 3]]
    assert row.places.tolist() == [[[2, 0, 0], [3, 0, 0], [4, 5, 6]]]
    ignored = IGNORED
    assert row.targets.tolist() == [[[8, ignored, ignored], [9, ignored, ignored], [11, 12, 13]]]


def test_rows_are_cut_with_all_that_belongs_to_them() -> None:
    whole = batch(examples(SEVERAL)).rows
    parts = cut(whole, 2)
    assert [len(part.tokens) for part in parts] == [2, 2, 1]
    for number, part in enumerate(parts):
        alone = batch(examples(SEVERAL)[2 * number : 2 * number + 2]).rows
        for name in ("tokens", "positions", "endings", "places", "targets", "right"):
            assert np.array_equal(getattr(part, name), getattr(alone, name)), name


def test_rows_that_are_too_long_are_a_row_for_each_word() -> None:
    data = examples(SEVERAL)
    length = batch(data).rows.tokens.shape[1]
    for most, joined in ((length, True), (length - 1, False)):
        made = collate_choices(data, joined=True, most_branching=most)
        assert isinstance(made.rows, JoinedRows) == joined
    assert len(collate_choices(data).rows.tokens) == 15


@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_plain_transformers(name: str, tune: str) -> None:
    """At the weights as they are, at displaced ones, with probes that share a forward pass."""
    model = model_of(family(name), tune)
    data = {lengths: examples(lengths) for lengths in (SINGLE, SEVERAL)}
    for lengths, own in data.items():
        steps = [(NO_STEPS, NO_STEPS), (TRAJECTORY, PERTURBATION), (TRAJECTORY, OPPOSITE)]
        probes = [Probe(batch(own), *both) for both in steps]
        found = model.choices(probes, loss=True)
        originals = {key: tensor.clone() for key, tensor in model.tensors.items()}
        for (trajectory, perturbation), one in zip(steps, found, strict=True):
            displace(model.tensors, model.layout, trajectory + perturbation, Distribution.GAUSSIAN)
            model.clear_cache()
            expected = of_each_answer(model.network, own)
            for key, tensor in model.tensors.items():
                tensor.copy_(originals[key])
            model.clear_cache()
            apart = differences(one.sums) - differences(expected)
            assert np.abs(apart).max() < 3e-5
            right = [example.right for example in own]
            np.testing.assert_allclose(one.losses, expected[np.arange(len(own)), right], rtol=1e-5)
            if lengths is SEVERAL:
                np.testing.assert_allclose(one.sums, expected, rtol=1e-5)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_seams_and_words_of_several_lengths_in_one_batch(tune: str) -> None:
    model = model_of(family("llama"), tune)
    (found,) = model.choices([Probe(batch(seams()))])
    np.testing.assert_allclose(found.sums, of_each_answer(model.network, seams()), rtol=1e-5)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_batches_of_several_clients_share_a_pass(tune: str) -> None:
    """Other lengths, rows, kinds of words and trajectories beside a probe; batches cut by rows."""
    model = model_of(family("llama"), tune, replace(plan(8), tokens_per_call=120))
    kinds = [examples(SEVERAL, 4, 1), examples(SINGLE, 3, 2), seams()]
    batches = [batch(kind) for kind in kinds]
    probes = [
        Probe(batches[0], TRAJECTORY, PERTURBATION),
        Probe(batches[0], TRAJECTORY, OPPOSITE),
        Probe(batches[1], TRAJECTORY[:1], PERTURBATION),
        Probe(collate_choices(kinds[1]), TRAJECTORY[:1], PERTURBATION),
        Probe(batches[2]),
    ]
    together = model.choices(probes)
    for probe, joint in zip(probes, together, strict=True):
        (alone,) = model.choices([probe])
        apart = differences(joint.sums) - differences(alone.sums)
        assert joint.sums.shape == alone.sums.shape and np.abs(apart).max() < 3e-5
    apart = differences(together[2].sums) - differences(together[3].sums)
    assert np.abs(apart).max() < 3e-5


@pytest.mark.parametrize("lengths", [SINGLE, SEVERAL])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_lies_below_the_first_block_is_shared(tune: str, lengths: Sequence[int]) -> None:
    network = family("llama")
    if tune == "lora":
        model: CausalModel = lora(network, plan=plan(4), blocks=[1])
    else:
        model = FullModel(network, plan=plan(4), blocks=[1])
    assert min(model.prefix.depths) == 1
    calls: list[int] = []
    block = model.network.get_submodule("model.layers.0")
    block.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    data = batch(examples(lengths))
    probes = [Probe(data, NO_STEPS, steps) for steps in (PERTURBATION, OPPOSITE)]
    shared = model.choices(probes)
    assert calls == [5]
    model.plan = replace(model.plan, shares_prefix=False)
    for one, other in zip(shared, model.choices(probes), strict=True):
        np.testing.assert_allclose(one.sums, other.sums, rtol=1e-5)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_head_that_cannot_be_taken_apart(tune: str) -> None:
    """Logits are taken where they are needed; and a head that is no plain linear map is called."""
    model = model_of(family("llama"), tune)
    for lengths in (SINGLE, SEVERAL):
        own = examples(lengths)
        probe = Probe(batch(own), TRAJECTORY, PERTURBATION)
        (expected,) = model.choices([probe], loss=True)
        module = model.head.module
        model.head.module = None
        (whole,) = model.choices([probe], loss=True)
        model.head.module = module
        assert module is not None
        module._hf_hook = None
        assert not model.head.sliceable
        (called,) = model.choices([probe], loss=True)
        del module._hf_hook
        for found in (whole, called):
            apart = differences(found.sums) - differences(expected.sums)
            assert np.abs(apart).max() < 3e-5
            np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)


def test_words_are_told_apart_below_the_rounding_of_half_precision() -> None:
    """A head in bfloat16 rounds logits to 1/128 of their size; the words' are float32."""
    model = model_of(family("llama").to(torch.bfloat16), "full", plan(1))
    (found,) = model.choices([Probe(batch(examples(count=40)))])
    rounded = torch.from_numpy(found.sums).to(torch.bfloat16).double().numpy()
    assert (found.sums != rounded).mean() > 0.9


@pytest.mark.parametrize(
    ("name", "joins", "most"),
    [
        ("llama", True, 2048),
        ("qwen3", True, 64),
        ("gpt2", True, 64),
        ("opt", True, 64),
        ("gemma2", True, 40),
        # The two texts are longer than what it sees.
        ("mistral", True, 0),
        # Where a token stands is no argument of theirs.
        ("bloom", True, 0),
        ("mamba", True, 0),
    ],
)
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_trial_says_which_words_share_a_row(name: str, joins: bool, most: int, tune: str) -> None:
    network = family(name)
    if name == "llama":
        network.config.max_position_embeddings = 2048
    model = model_of(network, tune, plan(2))
    model.plan = settled(model)
    before = model.digest()
    found = with_choices(model, model.plan)
    assert (found.joins_choices, found.most_branching) == (joins, most)
    assert replace(found, joins_choices=False, most_branching=0) == model.plan
    assert model.digest() == before


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_network_that_ignores_mask_or_positions_has_a_row_for_each_word(
    ignored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = family("llama")
    body = network.model.forward

    def deaf(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **(kwargs | {ignored: None}))

    monkeypatch.setattr(network.model, "forward", deaf)
    model = model_of(network, "lora", plan(2))
    found = with_choices(model, model.plan)
    assert (found.joins_choices, found.most_branching) == (True, 0)


@pytest.mark.parametrize("lengths", [SINGLE, SEVERAL])
@pytest.mark.parametrize("joined", [False, True])
def test_objectives_are_the_cross_entropy_and_the_accuracy(
    lengths: Sequence[int], joined: bool
) -> None:
    model = model_of(family("llama"), "lora")
    own = examples(lengths, 12)
    sums = of_each_answer(model.network, own)
    for kind, expected in (
        (Choice, cross_entropy(sums, own)),
        (Accuracy, (sums.argmin(axis=1) != [e.right for e in own]).astype(float)),
    ):
        data = kind(joined, NO_LIMIT).batch(own)
        assert isinstance(data.rows, JoinedRows) == joined
        (found,) = model.evaluate([Probe(data)])
        np.testing.assert_allclose(found.sums, expected, atol=2e-5)
        assert found.counts.tolist() == [1] * 12
    assert Choice().metric(0.25) == 0.25 and Accuracy().metric(0.25) == 0.75


@pytest.mark.parametrize("joined", [False, True])
def test_the_choice_of_broken_weights_is_not_finite(joined: bool) -> None:
    network = family("llama")
    network.model.norm.weight.data[0] = math.nan
    data = Choice(joined).batch(examples())
    (found,) = FullModel(network, plan=plan(1)).evaluate([Probe(data)])
    assert math.isnan(found.mean) and np.isnan(found.sums).all()


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("lengths", [SINGLE, SEVERAL])
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_backpropagation_goes_through_the_choice(
    tune: str, lengths: Sequence[int], joined: bool
) -> None:
    """The loss is that of forward passes, and the gradient the one of a direction's difference."""
    model = model_of(family("llama"), tune)
    data = Choice(joined, NO_LIMIT).batch(examples(lengths))
    for parameter in model.tuned_parameters():
        parameter.requires_grad_(True)
    loss = model.loss(data)
    loss.backward()
    (forward,) = model.evaluate([Probe(data)])
    assert float(loss.detach()) == pytest.approx(forward.mean, rel=1e-5)
    tensor = max(model.tuned_parameters(), key=lambda p: p.grad.abs().max().item())
    step = torch.zeros_like(tensor)
    step.view(-1)[tensor.grad.abs().argmax()] = 1e-2
    slope = float((tensor.grad * step).sum())
    with torch.no_grad():
        sides = []
        for sign in (1, -2):
            tensor += sign * step
            sides.append(model.loss(data).item())
        tensor += step
    assert (sides[0] - sides[1]) / 2 == pytest.approx(slope, rel=2e-2)


def test_masked_weights_stay_in_the_words_rows_of_the_head() -> None:
    model = model_of(family("llama"), "full")
    random = torch.Generator().manual_seed(0)
    model.masks = {
        name: torch.rand(tensor.shape, generator=random) < 0.2
        for name, tensor in model.tensors.items()
    }
    own = examples()
    steps = (TRAJECTORY, PERTURBATION)
    (joined,) = model.choices([Probe(batch(own), *steps)])
    (apart,) = model.choices([Probe(collate_choices(own), *steps)])
    np.testing.assert_allclose(differences(joined.sums), differences(apart.sums), atol=3e-5)
    model.masks = {}
    (free,) = model.choices([Probe(batch(own), *steps)])
    assert np.abs(differences(free.sums) - differences(joined.sums)).max() > 1e-3
