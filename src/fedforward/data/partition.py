"""Dividing the training examples among clients, through the partitioners of `flwr-datasets`."""

import warnings
from collections.abc import Sequence

import numpy as np

from fedforward.core.errors import FedForwardError
from fedforward.data.spool import Numbers, narrow

_ROW = "__row__"


def partition(
    values: Sequence[str] | None,
    examples: int,
    clients: int,
    *,
    kind: str,
    field: str | None,
    alpha: float,
    seed: int,
) -> list[Numbers]:
    """The indices of each client's examples; every index once, every client at least one.

    Args:
        values: per example, the text of the field to divide by; None for "iid".
        examples: how many there are.
        clients: N.
        kind: "iid", "dirichlet" (`alpha` of the label distribution) or "by-field" (whole values).
        field: its name, for errors.
        alpha: of the Dirichlet distribution.
        seed: of the shuffles.

    Raises:
        FedForwardError: more clients than examples, or values that cannot be divided so.
    """
    if clients > examples:
        raise FedForwardError(
            f"federation.clients = {clients}, but only {examples} training examples are left "
            "after the held-out ones. Use fewer clients or more data."
        )
    if kind == "iid":
        # As `IidPartitioner` of a shuffled table, which takes 200 bytes a row.
        order = np.random.default_rng(seed % 2**32).permutation(examples)
        return np.array_split(narrow(order), clients)
    import datasets
    from flwr_datasets.partitioner import (
        DirichletPartitioner,
        GroupedNaturalIdPartitioner,
        Partitioner,
    )

    assert values is not None
    content = {_ROW: np.arange(examples), "value": list(values)}
    table = datasets.Dataset.from_dict(content).shuffle(seed=seed % 2**32)
    partitioner: Partitioner
    if kind == "dirichlet":
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="value",
            alpha=alpha,
            min_partition_size=1,
            seed=seed % 2**32,
        )
    else:
        size = _group_size(len(set(table["value"])), clients, field)
        partitioner = GroupedNaturalIdPartitioner(
            partition_by="value", group_size=size, sort_unique_ids=True
        )
    partitioner.dataset = table
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [
                narrow(np.asarray(partitioner.load_partition(i).with_format("numpy")[:][_ROW]))
                for i in range(clients)
            ]
    except (ValueError, RuntimeError) as error:
        raise FedForwardError(
            f"federation.partition = {kind!r} with alpha = {alpha} left a client without examples "
            f"in every attempt ({examples} examples, {clients} clients). Use a larger "
            "federation.alpha, fewer clients or more data."
        ) from error
    finally:
        datasets.enable_progress_bars()


def _group_size(distinct: int, clients: int, field: str | None) -> int:
    """How many of a field's values each client gets; refuses what cannot be dealt evenly."""
    size = -(-distinct // clients)
    if clients > distinct or -(-distinct // size) != clients:
        fitting = sorted({-(-distinct // group) for group in range(1, distinct + 1)})
        raise FedForwardError(
            f"federation.partition = 'by-field' with field {field!r}: its {distinct} values cannot "
            f"be dealt to {clients} clients in groups of equal size. Use federation.clients = "
            f"{', '.join(map(str, fitting))}, or another field."
        )
    return size
