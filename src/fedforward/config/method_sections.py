"""The sections of who takes part, what is done in a round, and what that may tell.

See `sections`. Imports neither PyTorch nor transformers.
"""

import keyword
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fedforward.config.fields import (
    MOST_COUNTED,
    Aggregator,
    Count,
    Estimator,
    Method,
    Objective,
    PathText,
    Positive,
    ReportFilters,
    Section,
    Share,
)
from fedforward.core.registry import METHODS
from fedforward.core.units import parse_bytes
from fedforward.messages.secure import LEAST_SITES, MOST_SITES
from fedforward.methods.base import method_class
from fedforward.methods.estimators import build_estimator
from fedforward.methods.parameters import parameters_of


class FederationSection(Section):
    """[federation]"""

    clients: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        3, description="parties; 1 is centralised MeZO"
    )
    rounds: Count = Field(100, description="T")
    participation: Share = Field(1.0, description="share of the clients in each round")
    weights: Literal["equal", "examples"] = Field("examples", description="of the average")
    weight_ratio: Annotated[float, Field(ge=1.0)] = Field(
        10.0,
        description="most that a client's examples count in the average, as a multiple of the "
        "median client's in the round",
    )
    weight_share: Share = Field(
        0.5, description="most that one client of three or more weighs in the average"
    )
    partition: Literal["iid", "dirichlet", "by-field"] = Field(
        "iid", description='"dirichlet" and "by-field" divide by the field below'
    )
    field: str | None = Field(None, description="field of the data to divide by")
    alpha: Positive = Field(0.5, description="of the Dirichlet partition: small is uneven")
    quorum: Count = Field(1, description="reports without which a round is not closed")
    deadline: Positive | None = Field(
        None, description="seconds after which a round is closed with the reports that are there"
    )
    secure_sums: bool = Field(
        False,
        description="sites mask their reports, so that the server sees the sum of a round's "
        "reports and no single one; for methods that need no more",
    )
    secure_threshold: Annotated[int, Field(ge=LEAST_SITES, le=MOST_SITES)] = Field(
        LEAST_SITES,
        description="with secure_sums: sites that a sum is of at least, and that must help to open "
        "it; more than two thirds of a round's sites in any case",
    )
    start_deadline: Positive = Field(
        600.0,
        description="across machines: seconds for a connected site to enrol; those that have not "
        "by then are not waited for, as long as there is a quorum",
    )

    @property
    def clients_of_a_round(self) -> int:
        """How many clients are asked in a round in which all are there."""
        return max(1, round(self.participation * self.clients))

    @model_validator(mode="after")
    def _quorum_can_be_reached(self) -> "FederationSection":
        most = self.clients_of_a_round
        if self.quorum > most:
            raise ValueError(
                f"quorum = {self.quorum} cannot be reached: clients = {self.clients} and "
                f"participation = {self.participation:g} make {most} clients a round"
            )
        return self


class MethodSection(Section):
    """[method]"""

    name: Method = Field("fedmezo", description="the algorithm")
    learning_rate: Positive | Literal["auto"] = Field(
        "auto",
        description='eta_0; "auto" finds it, and changes it, by what clients measure along the '
        "last update",
    )
    client_rates: Literal["fixed", "random", "loss", "loss-window", "update-difference"] = Field(
        "fixed", description="how clients' own learning rates differ from eta_0"
    )
    rate_spread: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="alpha of client_rates: rates lie in eta_0 ± alpha; default eta_0 / 2"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of eta_0 over the rounds"
    )
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="rounds until the full rate")
    final: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.0, description="what linear and cosine end at, as a share of eta_0"
    )
    mu: Positive = Field(1e-3, description="perturbation scale")
    local_steps: Count = Field(30, description="H")
    directions: Count = Field(1, description="directions averaged in each step")
    estimator: Estimator = Field(
        "two-point",
        description="of the projected gradients; fzoo takes directions + 1 probes a step, "
        "normalised by the spread of their losses",
    )
    mask: Literal["none", "random", "small", "file"] = Field(
        "none",
        description="which tuned weights move at all: a random share, those of least magnitude, or "
        "those of mask_file",
    )
    mask_file: PathText | None = Field(
        None, description="file of `fedforward mask`, with the weights of the largest gradients"
    )
    density: Share = Field(0.1, description="share of the weights that a mask lets move")
    distribution: Literal["gaussian", "rademacher"] = Field(
        "gaussian", description="of the directions"
    )
    batch_size: Count = Field(1, description="examples per step")
    objective: Objective | None = Field(
        None,
        description="what is optimised; also package.module:function of predictions and "
        "references; default choice with data.label_words, else loss",
    )
    aggregator: Aggregator = Field("mean", description="how the clients' reports become one update")
    tolerated: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="f, clients of a round that may report wrong numbers, for trimmed-mean (of at "
        "least 2f + 1 clients), krum and multi-krum (of 2f + 3); default 1",
    )
    report_filters: ReportFilters = Field(
        [], description="what every client does to a report before it is sent, in this order"
    )
    parameters: dict[str, bool | int | float | str] = Field(
        {}, description="the method's own settings, which may also stand beside these keys"
    )

    @model_validator(mode="before")
    @classmethod
    def _own_settings(cls, content: Any) -> Any:
        """Keys that the named method declares become its settings."""
        name = content.get("name", "fedmezo") if isinstance(content, dict) else None
        if not isinstance(name, str) or name not in METHODS:
            return content
        declared = parameters_of(method_class(name))
        own = {key: value for key, value in content.items() if key in declared}
        given = content.get("parameters", {})
        if not own or not isinstance(given, dict):
            return content
        for key in own.keys() & given.keys():
            if own[key] != given[key]:
                raise ValueError(
                    f"{key} = {own[key]!r} and parameters.{key} = {given[key]!r} are the same "
                    "setting; leave one of them out"
                )
        rest = {key: value for key, value in content.items() if key not in own}
        return {**rest, "parameters": {**given, **own}}

    @field_validator("parameters")
    @classmethod
    def _parameters_are_arguments(
        cls, parameters: dict[str, bool | int | float | str]
    ) -> dict[str, bool | int | float | str]:
        for name in parameters:
            if not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(
                    f"{name!r} cannot name a parameter: it must be letters, digits and '_', as in "
                    "{ tau = 0.5 }"
                )
        return parameters

    @property
    def alpha(self) -> float:
        """The spread of the clients' rates that is in force; of "auto" as a share of the rate."""
        if self.learning_rate == "auto":
            return 0.5
        return self.learning_rate / 2 if self.rate_spread is None else self.rate_spread

    @property
    def probes_per_step(self) -> int:
        """Forward passes of one local step."""
        estimator = build_estimator(self.estimator, self.directions, self.mu)
        count: int = estimator.probes_per_step
        return count

    @model_validator(mode="after")
    def _a_file_is_what_the_mask_is_read_from(self) -> "MethodSection":
        if self.mask_file is not None and self.mask != "file":
            raise ValueError(
                f"mask_file = {self.mask_file!r} is read with mask = 'file', and mask = "
                f"{self.mask!r}; set mask = 'file', or leave mask_file out"
            )
        return self

    @model_validator(mode="after")
    def _rates_stay_positive(self) -> "MethodSection":
        if self.learning_rate == "auto":
            if self.rate_spread is not None:
                raise ValueError(
                    f"rate_spread = {self.rate_spread} is a part of a learning_rate, which is "
                    "'auto'; leave it out (rates then lie within half of the one that is found), "
                    "or give learning_rate a number"
                )
        elif self.alpha > self.learning_rate:
            raise ValueError(
                f"rate_spread = {self.rate_spread} is above learning_rate = {self.learning_rate}, "
                "so that a client's rate could be negative; allowed is 0 to learning_rate"
            )
        return self

    @model_validator(mode="after")
    def _report_holds_the_steps(self) -> "MethodSection":
        if self.local_steps * self.directions > MOST_COUNTED:
            raise ValueError(
                f"local_steps = {self.local_steps} times directions = {self.directions} is "
                f"{self.local_steps * self.directions}; allowed are at most {MOST_COUNTED} numbers "
                "in a report"
            )
        return self


class PrivacySection(Section):
    """[privacy], differential privacy of each client's examples; off without `clip`"""

    clip: Positive | None = Field(
        None,
        description="C, most that one example's projected gradients of a step may be long together",
    )
    level: Literal["example", "client"] = Field(
        "example",
        description="whose data are protected: one example's, with noise at each client, or all of "
        "a client's, with noise at the server",
    )
    mechanism: Literal["gaussian", "laplace"] = Field(
        "gaussian",
        description='the noise; with "laplace" lengths are sums of absolute values, and epsilon '
        "holds without a delta",
    )
    adjacency: Literal["add-remove", "replace-one"] = Field(
        "add-remove",
        description="what epsilon compares: data with an example more or fewer, or with one "
        "replaced by another",
    )
    noise_multiplier: Annotated[float, Field(ge=1e-3)] | None = Field(
        None, description="sigma: scale of the noise of a step's sum as a multiple of clip"
    )
    target_epsilon: Positive | None = Field(
        None,
        description="in place of noise_multiplier: epsilon of all federation.rounds together, from "
        "which the noise follows",
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="chance that epsilon does not hold; below 1 / examples, and none with "
        '"laplace"',
    )
    examples: Count | None = Field(
        None,
        description="about how many examples a client has, as all may know; each is in a step's "
        "sample with the chance method.batch_size / examples",
    )

    heldout: Literal["withheld", "plain"] = Field(
        "withheld",
        description="what sites across machines send of their held-out rows: nothing, or figures "
        "without noise",
    )

    @property
    def on(self) -> bool:
        """Whether a run has noise."""
        return self.clip is not None

    @property
    def withholds(self) -> bool:
        """Whether figures of held-out rows stay at the sites."""
        return self.on and self.heldout == "withheld"

    @model_validator(mode="after")
    def _all_or_nothing(self) -> "PrivacySection":
        numbers = ("clip", "noise_multiplier", "target_epsilon", "delta", "examples")
        given = {name: value for name, value in self if name in numbers and value is not None}
        if not given:
            return self
        pure, whole = self.mechanism == "laplace", self.level == "client"
        if whole and self.examples is not None:
            raise ValueError(
                f"examples = {self.examples} is for level = 'example': with 'client' all examples "
                "of a client count as one; leave examples out"
            )
        if pure and self.delta is not None:
            raise ValueError(
                f"delta = {self.delta:g} is for mechanism = 'gaussian': with 'laplace' epsilon "
                "always holds; leave delta out"
            )
        needed = ["clip", *([] if pure else ["delta"]), *([] if whole else ["examples"])]
        for name in needed:
            if name not in given:
                found = ", ".join(f"{key} = {value:g}" for key, value in given.items())
                raise ValueError(f"{name} is missing beside {found}; set it, or leave all out")
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError(
                "either noise_multiplier or target_epsilon must be given, and not both; the one "
                "decides the other"
            )
        if self.delta is not None and self.examples is not None and self.delta * self.examples >= 1:
            raise ValueError(
                f"delta = {self.delta:g} is not below 1 / examples = {1 / self.examples:g}, and "
                "would let one example be shown to all; use a smaller one, such as "
                f"{0.1 / self.examples:.1g}"
            )
        return self


class ServerSection(Section):
    """[server]"""

    learning_rate: Positive = Field(1.0, description="multiplies the clients' average update")
    state_decay: Share = Field(
        1.0, description="multiplies the tuned state in every round; 1 leaves it"
    )
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="beta: older rounds' steps are repeated, times beta per round of age"
    )
    window: Annotated[int, Field(ge=1, le=1000)] = Field(
        5, description="rounds that momentum and normalise look back, the current one included"
    )
    normalise: bool = Field(
        False,
        description="divide learning rates by the size of recent projected gradients, "
        "relative to round 1",
    )

    @property
    def plain(self) -> bool:
        """Whether the clients' average is written as it is."""
        return self.learning_rate == 1 and self.state_decay == 1 and not self.momentum


class PlanningSection(Section):
    """[planning], of the blocks that zorba allots to clients"""

    budgets: str | list[str] | None = Field(
        None,
        description='memory of each client, the model included: "6 GiB" for all, a list with one '
        'for each, or "measured" for what is free on this device',
    )
    active: list[int] | None = Field(
        None, description="in place of budgets: how many blocks each client can perturb"
    )
    epsilon: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="how far above its least the convergence surrogate may be, to save memory"
    )
    objective: Literal["total", "worst"] = Field(
        "total", description="which memory is then least: of all clients, or of the worst"
    )
    dimension_penalty: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="weight of the clients' active dimensions in the surrogate"
    )
    weights: Literal["parameters", "sensitivity"] = Field(
        "parameters",
        description="of blocks in the surrogate: their share of the tuned parameters, or how much "
        "the loss feels them, measured before the run",
    )

    @model_validator(mode="after")
    def _amounts_are_amounts(self) -> "PlanningSection":
        if self.budgets is not None and self.active is not None:
            raise ValueError("budgets and active say the same thing twice; leave one of them out")
        for text in [] if self.budgets == "measured" else self.texts:
            try:
                parse_bytes(text)
            except ValueError as error:
                raise ValueError(f"budgets: {error}") from error
        if self.active is not None and min(self.active, default=0) < 1:
            raise ValueError(
                f"active = {self.active} is not allowed: every client perturbs at least one block"
            )
        return self

    @property
    def texts(self) -> list[str]:
        """`budgets` as a list."""
        return [self.budgets] if isinstance(self.budgets, str) else self.budgets or []
