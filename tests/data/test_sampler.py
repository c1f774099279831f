import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedforward.core.batches import IGNORED
from fedforward.core.errors import FedForwardError
from fedforward.data.examples import Example, Examples, ExampleStore
from fedforward.data.partition import partition
from fedforward.data.sampler import Batches, by_length, collate


def numbered(count: int) -> list[Example]:
    return [Example(np.array([n, n + 1000], np.int64), 1) for n in range(count)]


def stream(count: int = 10, size: int = 3, seed: int = 5, client: int = 0) -> Batches:
    return Batches(numbered(count), batch_size=size, run_seed=seed, client=client)


def drawn(batches: Batches, steps: Sequence[int]) -> list[list[int]]:
    return [batches[step].tokens[:, 0].tolist() for step in steps]


def test_a_batch_is_a_function_of_the_step() -> None:
    steps = list(range(20))
    forwards = drawn(stream(), steps)
    assert drawn(stream(), steps[::-1]) == forwards[::-1]
    same = stream()
    assert drawn(same, [7, 0, 7, 19, 3]) == [forwards[step] for step in (7, 0, 7, 19, 3)]
    assert drawn(stream(client=1), steps) != forwards
    assert drawn(stream(seed=6), steps) != forwards


@given(count=st.integers(1, 12), size=st.integers(1, 15))
def test_every_epoch_sees_every_example_once(count: int, size: int) -> None:
    flat = [n for batch in drawn(stream(count, size), range(3 * count)) for n in batch]
    for begin in range(0, len(flat) - count + 1, count):
        assert sorted(flat[begin : begin + count]) == list(range(count))


def test_epochs_are_shuffled_anew() -> None:
    first, second = (drawn(stream(10, 10), [epoch])[0] for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_examples_of_a_batch_have_similar_lengths(epoch: int) -> None:
    """Most of the padding of a plain shuffle is gone, and the lengths of batches have no order."""
    random = np.random.default_rng(0)
    examples = [Example(np.full(length, 7), 1) for length in random.integers(20, 220, 203)]
    batches = Batches(examples, batch_size=4, run_seed=1, client=0)
    # Not a multiple of the batch size: later epochs begin within a batch.
    places = [step for step in range(160) if 203 * epoch <= 4 * step < 203 * (epoch + 1) - 4]
    drawn_batches = [batches[step] for step in places]
    padding = sum(int((b.labels == IGNORED).sum()) - 4 for b in drawn_batches)
    shuffled = [examples[n] for n in random.permutation(203)[:200]]
    lengths = np.array([len(e.tokens) for e in shuffled]).reshape(-1, 4)
    assert padding < 0.4 * (lengths.max(axis=1, keepdims=True) - lengths).sum()
    order = [b.tokens.shape[1] for b in drawn_batches]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.4


def test_evaluation_batches_hold_every_example_once() -> None:
    examples = [Example(np.full(length, length, np.int64), 1) for length in (5, 2, 9, 3, 2)]
    batches = [collate(group) for group in by_length(examples, 2)]
    assert [batch.tokens.shape for batch in batches] == [(2, 2), (2, 5), (1, 9)]
    assert (batches[1].labels[0] != IGNORED).sum() == 2


def divided(values: Sequence[Any], clients: int, kind: str, seed: int = 1) -> list[list[int]]:
    texts = list(map(str, values))
    options: dict[str, Any] = {"kind": kind, "field": "site", "alpha": 0.5, "seed": seed}
    parts = partition(None if kind == "iid" else texts, len(texts), clients, **options)
    return [part.tolist() for part in parts]


SITES = [f"s{n % 6}" for n in range(60)]


@pytest.mark.parametrize(
    ("kind", "clients"), [("iid", 7), ("dirichlet", 4), ("by-field", 3), ("iid", 60)]
)
def test_every_index_goes_to_one_client(kind: str, clients: int) -> None:
    parts = divided(SITES, clients, kind)
    assert len(parts) == clients and all(parts)
    assert sorted(index for part in parts for index in part) == list(range(60))
    assert divided(SITES, clients, kind) == parts
    assert divided(SITES, clients, kind, seed=2) != parts


@pytest.mark.parametrize("clients", [1, 7, 60])
def test_iid_is_that_of_the_partitioner(clients: int) -> None:
    import datasets
    from flwr_datasets.partitioner import IidPartitioner

    partitioner = IidPartitioner(num_partitions=clients)
    partitioner.dataset = datasets.Dataset.from_dict({"n": list(range(60))}).shuffle(seed=1)
    parts = [partitioner.load_partition(client)["n"] for client in range(clients)]
    assert divided(SITES, clients, "iid") == [list(part) for part in parts]


def test_by_keeps_a_site_together() -> None:
    owners: dict[str, set[int]] = {}
    for client, part in enumerate(divided(SITES, 3, "by-field")):
        for index in part:
            owners.setdefault(SITES[index], set()).add(client)
    assert sorted(map(len, owners.values())) == [1] * 6


def test_a_partition_that_cannot_be() -> None:
    with pytest.raises(FedForwardError, match=r"federation\.clients = 4, but only 3 training"):
        divided([0, 1, 2], 4, "iid")
    with pytest.raises(FedForwardError, match=r"Use federation\.clients = 1, 2, 3, 6, or another"):
        divided(SITES, 4, "by-field")
    with pytest.raises(FedForwardError, match=r"alpha = 0\.0001 left a client without examples"):
        partition(["a"] * 12, 12, 12, kind="dirichlet", field="site", alpha=1e-4, seed=0)


def same(one: Example, other: Example) -> bool:
    arrays = zip((one.tokens, *one.choices), (other.tokens, *other.choices), strict=True)
    plain = ("prompt_length", "reference", "right", "spans", "choice_prompts")
    return all(np.array_equal(a, b) for a, b in arrays) and all(
        getattr(one, name) == getattr(other, name) for name in plain
    )


def test_a_store_gives_back_what_it_was_given() -> None:
    random = np.random.default_rng(0)
    examples = [Example(np.arange(5), 2, "é“"), Example(np.arange(3), 1, spans=((1, 2), (2, 3)))]
    for count, spans in itertools.product((0, 1, 4), (0, 2)):
        choices = tuple(random.integers(0, 9, 3 + n) for n in range(count))
        prompts = tuple(range(1, count + 1))
        marks = tuple((n, n + 1) for n in range(spans))
        examples.append(
            Example(random.integers(0, 2**31, 7), 3, "x", choices, count, marks, prompts)
        )
    store = ExampleStore()
    for number, example in enumerate(examples):
        store.append(example)
        # Read between writes, too.
        assert same(store[number], example)
    view = Examples(store, np.arange(len(store))[::-1].copy())
    assert all(same(a, b) for a, b in zip(view, examples[::-1], strict=True))
    assert view.lengths.tolist() == [len(e.tokens) for e in examples[::-1]]
    assert same(view[1:3][0], examples[-2]) and store.longest_prompt == 3
    assert Examples(ExampleStore(), np.arange(0)).lengths.tolist() == []


def test_examples_on_disk_give_the_same_batches() -> None:
    random = np.random.default_rng(0)
    examples = [Example(random.integers(3, 99, n), 1) for n in random.integers(2, 30, 50)]
    store = ExampleStore()
    for example in examples:
        store.append(example)
    view = Examples(store, np.arange(50))
    options: dict[str, Any] = {"batch_size": 4, "run_seed": 1, "client": 0}
    kept, held = Batches(view, **options), Batches(examples, **options)
    for step in range(40):
        assert np.array_equal(kept[step].tokens, held[step].tokens)
        assert np.array_equal(kept[step].labels, held[step].labels)  # type: ignore[attr-defined]
    groups = zip(by_length(view, 8), by_length(examples, 8), strict=True)
    assert all(same(a, b) for one, other in groups for a, b in zip(one, other, strict=True))
