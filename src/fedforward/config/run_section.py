"""The section of how a run is carried out on a machine.

See `sections`. Imports neither PyTorch nor transformers.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedforward.config.fields import (
    Count,
    Section,
)
from fedforward.core.units import parse_bytes

#: What [run] says of `activation_cache`, of a run and of a site.
ACTIVATION_CACHE = (
    'host memory for what enters the first of model.blocks, kept by example: "1 GiB", "none" or '
    '"auto", a quarter of what is free and at most 1 GiB'
)


def check_cache(given: str) -> None:
    """Refuse an `activation_cache` that is no amount.

    Raises:
        ValueError: with what is allowed.
    """
    if given in ("auto", "none"):
        return
    try:
        size = parse_bytes(given)
    except ValueError as error:
        raise ValueError(f"activation_cache: {error}, or as 'auto' or 'none'") from error
    if not size:
        raise ValueError(f"activation_cache = {given!r} keeps nothing; write that as 'none'")


class RunSection(Section):
    """[run]"""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of every random choice")
    device: str = Field("auto", description='"auto", "cpu", "cuda" or "cuda:1"')
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads; 0 is all cores")
    evaluate_every: Count = Field(10, description="rounds between held-out evaluations")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="evaluations without a lower held-out loss before stopping; 0 is never"
    )
    callbacks: list[str] = Field(
        [],
        description='who is told of the figures of each round: "csv", "tensorboard", "wandb", or '
        "of a package of your own",
    )
    on_divergence: Literal["stop", "rollback"] = Field(
        "stop",
        description='"rollback" takes back the rounds after the lowest held-out loss, goes on with '
        "a third of the rate, and stops after five times",
    )
    probes_per_call: Annotated[int, Field(ge=0)] = Field(
        0, description="most probes that share a forward pass; 0 chooses"
    )
    tokens_per_call: Annotated[int, Field(ge=0)] = Field(
        0, description="tokens of a forward pass, beyond which probes or rows wait; 0 chooses"
    )
    memory_budget: str | None = Field(
        None,
        description='"6 GiB": share a forward pass among as many probes as fit, the model included',
    )
    trajectory: Literal["auto", "recompute", "cache"] = Field(
        "auto",
        description='local steps under full tuning: "recompute" them in every probe (slower, no '
        'memory), or "cache" their sum in float32 (4 bytes a parameter)',
    )
    activation_cache: str = Field("auto", description=ACTIVATION_CACHE)

    @model_validator(mode="after")
    def _cache_is_an_amount(self) -> "RunSection":
        check_cache(self.activation_cache)
        return self

    @property
    def cache_bytes(self) -> int | None:
        """`activation_cache` in bytes; None for "auto"."""
        if self.activation_cache == "auto":
            return None
        return 0 if self.activation_cache == "none" else parse_bytes(self.activation_cache)

    @model_validator(mode="after")
    def _budget_is_an_amount(self) -> "RunSection":
        if self.memory_budget is not None:
            try:
                parse_bytes(self.memory_budget)
            except ValueError as error:
                raise ValueError(f"memory_budget: {error}") from error
            if self.probes_per_call:
                raise ValueError(
                    f"memory_budget = {self.memory_budget!r} chooses probes_per_call, which is "
                    f"set to {self.probes_per_call}; leave one of them out"
                )
        return self

    @property
    def budget(self) -> int | None:
        """`memory_budget` in bytes."""
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)
