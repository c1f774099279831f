"""The configuration of a run: typed, read from TOML and `section.key=value`, with errors that help.

Every error names the key as the user typed it, the value found, what is allowed, and for an
unknown key the nearest legal one. This module imports neither PyTorch nor transformers.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fedforward.core.errors import FedForwardError
from fedforward.core.units import parse_bytes

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Chance = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
#: What a report or a ledger entry counts in 16 bits: clients, and the steps of a round.
MOST_COUNTED = 65535
#: What `method.objective` takes beside a user's function, and `evaluation.metrics` beside those.
OBJECTIVES = ("loss", "accuracy", "exact-match", "f1", "rougeL")
METRICS = ("loss", "perplexity", "accuracy", "exact-match", "f1", "rougeL")


class Section(BaseModel):
    """Keys of a configuration file, or its sections: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """[model]"""

    path: str = Field(description="folder in Hugging Face format, or a hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights as they are held in memory"
    )
    tune: Literal["lora", "full"] = Field("lora", description="what the run changes")
    head: Literal["causal", "classification"] = Field(
        "causal", description="what the network ends in: the next token, or a text's class"
    )
    blocks: str | list[int] = Field(
        "all", description='transformer blocks that are tuned: "all", "8-15" or [0, 5], from 0'
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="of a frozen base's linear layers: 4 bits through bitsandbytes"
    )
    device_map: Literal["none", "auto"] = Field(
        "none", description='"auto" spreads a frozen base over all CUDA devices and host memory'
    )
    resting: Literal["device", "host"] = Field(
        "device",
        description="where transformer blocks wait that a client does not perturb; from host "
        "memory they come to the CUDA device in turn (without one there is nothing to move)",
    )

    @property
    def tuned_blocks(self) -> tuple[int, ...] | None:
        """The numbers in `blocks`, in order; None for all."""
        if isinstance(self.blocks, list):
            return tuple(sorted(set(self.blocks)))
        if self.blocks == "all":
            return None
        first, dash, last = self.blocks.partition("-")
        end = int(last if dash else first)
        if end > MOST_COUNTED:
            raise ValueError
        return tuple(range(int(first), end + 1))

    @model_validator(mode="after")
    def _blocks_are_numbers(self) -> "ModelSection":
        try:
            blocks = self.tuned_blocks
        except ValueError:
            blocks = ()
        if blocks is not None and (not blocks or min(blocks) < 0):
            raise ValueError(
                f"blocks = {self.blocks!r} is not allowed: it must be 'all', a range such as "
                "'8-15', or a list of whole numbers from 0"
            )
        return self

    @model_validator(mode="after")
    def _only_a_frozen_base_in_one_place_is_packed(self) -> "ModelSection":
        for key, value in (("quantization", self.quantization), ("device_map", self.device_map)):
            if value != "none" and self.resting == "host":
                raise ValueError(
                    f"resting = 'host' moves plain weights of one device, and {key} = {value!r}; "
                    f"use resting = 'device' or {key} = 'none'"
                )
            if value != "none" and self.tune == "full":
                raise ValueError(
                    f"{key} = {value!r} is for a frozen base, and tune = 'full' changes every "
                    f"weight; use tune = 'lora' or {key} = 'none'"
                )
        return self


class LoraSection(Section):
    """[lora]"""

    rank: Count = Field(8, description="r")
    alpha: Positive = Field(16.0, description="the product BA is scaled by alpha / rank")
    targets: str | list[str] = Field(
        "all-linear", description='"all-linear", or names such as ["q_proj", "v_proj"]'
    )
    factors: Literal["both", "B"] = Field("both", description='"B" keeps the initial A')


class DataSection(Section):
    """[data]"""

    source: str = Field(description="file (.jsonl .json .csv .tsv .parquet) or hub data set")
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    prompt: str = Field(
        "### Instruction:\n{instruction}\n\n### Response:\n",
        description="template; {name} stands for a field",
    )
    answer: str = Field("{output}", description="template; only its tokens count in the loss")
    label_words: dict[str, str] | None = Field(
        None,
        description="words for the values of the answer's field, all of them possible answers: "
        '{ 0 = " terrible", 1 = " great" }',
    )
    answer_tokens: Count = Field(48, description="most tokens of a generated answer")
    heldout: Annotated[float, Field(gt=0.0)] = Field(
        0.01,
        description="share of the examples (below 1) or their number, kept for evaluation; none "
        "are with evaluation.source",
    )
    sequence_length: Count = Field(512, description="most tokens of an example")
    limit: Count | None = Field(None, description="use only so many examples of the source")
    example: str | None = Field(
        None, description="prompt to answer before and after; default the first held-out one"
    )
    fields: dict[str, str] | None = Field(
        None,
        description="what the templates' fields are called in this source, where that differs: "
        '{ instruction = "question" }',
    )

    @field_validator("label_words")
    @classmethod
    def _words_can_be_told_apart(cls, words: dict[str, str] | None) -> dict[str, str] | None:
        if words is not None and (len(words) < 2 or len(set(words.values())) < len(words)):
            raise ValueError(
                f"{words!r} is not allowed: it must be two or more different words by the values "
                'that they stand for, as in { 0 = " terrible", 1 = " great" }'
            )
        return words


class EvaluationSection(Section):
    """[evaluation]"""

    metrics: list[str] = Field(
        [],
        description="measured beside the held-out loss: "
        + ", ".join(METRICS)
        + ", or package.module:function",
    )
    source: str | None = Field(
        None, description="file or hub data set to evaluate on; default examples kept by heldout"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("test", description="split of a hub data set")
    limit: Count | None = Field(None, description="evaluate on only so many examples")
    site: str | None = Field(
        None,
        description="across machines: the site that evaluates; default all, weighted by their "
        "held-out answers",
    )

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, metrics: list[str]) -> list[str]:
        for place, metric in enumerate(metrics):
            _check_name(metric, METRICS)
            if metric in metrics[:place]:
                raise ValueError(f"{metric!r} is there twice; leave one of them out")
        return metrics


class FederationSection(Section):
    """[federation]"""

    clients: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        3, description="parties; 1 is centralised MeZO"
    )
    rounds: Count = Field(100, description="T")
    participation: Share = Field(1.0, description="share of the clients in each round")
    weights: Literal["equal", "examples"] = Field("examples", description="of the average")
    partition: Literal["iid", "dirichlet", "by"] = Field(
        "iid", description='"dirichlet" and "by" divide by the field below'
    )
    field: str | None = Field(None, description="field of the data to divide by")
    alpha: Positive = Field(0.5, description="of the Dirichlet partition: small is uneven")
    quorum: Count = Field(1, description="reports without which a round is not closed")
    deadline: Positive | None = Field(
        None, description="seconds after which a round is closed with the reports that are there"
    )

    @model_validator(mode="after")
    def _quorum_can_be_reached(self) -> "FederationSection":
        most = max(1, round(self.participation * self.clients))
        if self.quorum > most:
            raise ValueError(
                f"quorum = {self.quorum} cannot be reached: clients = {self.clients} and "
                f"participation = {self.participation:g} make {most} clients a round"
            )
        return self


class MethodSection(Section):
    """[method]"""

    name: Literal["fedmezo", "decomfl", "zorba", "fedkseed", "fedkseed-pro", "fedavg"] = Field(
        "fedmezo", description="the algorithm"
    )
    learning_rate: Positive = Field(1e-3, description="eta_0")
    strategy: Literal["fixed", "random", "loss", "loss-window", "update-difference"] = Field(
        "fixed", description="how clients' own rates differ from eta_0"
    )
    spread: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="alpha of the strategy: rates lie in eta_0 ± alpha; default eta_0 / 2"
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
    estimator: Literal["two-point", "fzoo"] = Field(
        "two-point",
        description="of the projected gradients; fzoo takes directions + 1 probes a step, "
        "normalised by the spread of their losses",
    )
    candidates: Annotated[int, Field(ge=1, le=MOST_COUNTED)] = Field(
        4096, description="K, seeds that all directions of a fedkseed run come from"
    )
    mask: Literal["none", "random", "small"] = Field(
        "none",
        description="which tuned weights move at all: a random share, or those of least magnitude",
    )
    density: Share = Field(0.1, description="share of the weights that a mask lets move")
    distribution: Literal["gaussian", "rademacher"] = Field(
        "gaussian", description="of the directions"
    )
    batch_size: Count = Field(1, description="examples per step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="of fedavg's clients")
    objective: str = Field(
        "loss",
        description="what is optimised: "
        + ", ".join(OBJECTIVES)
        + ", or package.module:function of predictions and references",
    )

    @field_validator("objective")
    @classmethod
    def _objective_is_known(cls, objective: str) -> str:
        _check_name(objective, OBJECTIVES)
        return objective

    @model_validator(mode="after")
    def _objective_has_a_gradient(self) -> "MethodSection":
        if self.name == "fedavg" and self.objective != "loss":
            raise ValueError(
                f"objective = {self.objective!r} has no gradient, and name = 'fedavg' trains by "
                "backpropagation; use name = 'fedmezo' or objective = 'loss'"
            )
        return self

    @property
    def alpha(self) -> float:
        """The spread that is in force."""
        return self.learning_rate / 2 if self.spread is None else self.spread

    @property
    def probes_per_step(self) -> int:
        """Forward passes of one local step."""
        return self.directions + 1 if self.estimator == "fzoo" else 2 * self.directions

    @property
    def pool(self) -> int:
        """`candidates`, or 0 for a method that has none."""
        return self.candidates if self.name in ("fedkseed", "fedkseed-pro") else 0

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's own settings."""
        own = {"candidates": self.candidates} if self.pool else {}
        return {"optimizer": self.optimizer} if self.name == "fedavg" else own

    @property
    def report_filters(self) -> list[str]:
        """What is done to reports."""
        return []

    @property
    def aggregator(self) -> str:
        """How scalars are joined."""
        return "mean"

    @model_validator(mode="after")
    def _a_spread_needs_two(self) -> "MethodSection":
        if self.estimator == "fzoo" and self.directions < 2:
            raise ValueError(
                f"estimator = 'fzoo' is normalised by the spread of its directions' losses, and "
                f"directions = {self.directions} has none; use directions = 2 or more (the paper "
                "has 8)"
            )
        return self

    @model_validator(mode="after")
    def _rates_stay_positive(self) -> "MethodSection":
        if self.alpha > self.learning_rate:
            raise ValueError(
                f"spread = {self.spread} is above learning_rate = {self.learning_rate}, so that a "
                "client's rate could be negative; allowed is 0 to learning_rate"
            )
        return self

    @model_validator(mode="after")
    def _strategy_has_its_numbers(self) -> "MethodSection":
        if self.name == "fedavg" and self.strategy == "update-difference":
            raise ValueError(
                "strategy = 'update-difference' needs the projected gradients of fedmezo; with "
                "fedavg allowed are 'fixed', 'random', 'loss' and 'loss-window'"
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


class ServerSection(Section):
    """[server]"""

    learning_rate: Positive = Field(1.0, description="multiplies the clients' average update")
    decay: Share = Field(1.0, description="multiplies the tuned state in every round")
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
        return self.learning_rate == 1 and self.decay == 1 and not self.momentum


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


class SimulationSection(Section):
    """[simulation], of what goes wrong with clients; every choice follows from run.seed"""

    failing: Chance = Field(0.0, description="chance that a client is gone for a round")
    slow: Chance = Field(0.0, description="chance that a report comes after the deadline")
    lying: Chance = Field(
        0.0,
        description="share of the clients that report wrong numbers, wrong states or nonsense",
    )
    late: Annotated[int, Field(ge=0)] = Field(
        0, description="so many clients (the last ones) join only in round late_round"
    )
    late_round: Count = Field(1, description="see late")


class RunSection(Section):
    """[run]"""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of every random choice")
    device: str = Field("auto", description='"auto", "cpu", "cuda" or "cuda:1"')
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads; 0 is all cores")
    evaluate_every: Count = Field(10, description="rounds between held-out evaluations")
    patience: Annotated[int, Field(ge=0)] = Field(
        0, description="evaluations without a lower held-out loss before stopping; 0 is never"
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
    trajectory: Literal["auto", "generate", "copy"] = Field(
        "auto",
        description='local steps under full tuning: "generate" in every probe (slower, no memory), '
        '"copy" in float32 (4 bytes a parameter)',
    )

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


class Config(Section):
    """A whole configuration."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    evaluation: EvaluationSection = EvaluationSection()
    federation: FederationSection = FederationSection()
    method: MethodSection = MethodSection()
    server: ServerSection = ServerSection()
    planning: PlanningSection = PlanningSection()
    simulation: SimulationSection = SimulationSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _one_key_chooses_the_device(self) -> "Config":
        if self.model.device_map == "auto" and self.run.device not in ("auto", "cuda"):
            raise ValueError(
                f"model.device_map = 'auto' takes all CUDA devices, and run.device = "
                f"{self.run.device!r} names one; use run.device = 'auto', or model.device_map = "
                "'none'"
            )
        return self

    @model_validator(mode="after")
    def _blocks_rest_from_probes(self) -> "Config":
        if self.model.resting == "host" and self.method.name == "fedavg":
            raise ValueError(
                "model.resting = 'host' is for blocks that probes do not move, and method.name = "
                "'fedavg' has no probes; use model.resting = 'device'"
            )
        if self.model.resting == "host" and self.run.memory_budget is not None:
            raise ValueError(
                f"run.memory_budget = {self.run.memory_budget!r} is measured with every block on "
                "the device, and model.resting = 'host' is for models that do not fit like that; "
                "leave it out and set run.probes_per_call"
            )
        return self

    @model_validator(mode="after")
    def _budget_is_for_probes(self) -> "Config":
        if self.run.memory_budget is not None and self.method.name == "fedavg":
            raise ValueError(
                f"run.memory_budget = {self.run.memory_budget!r} says how many probes share a "
                "forward pass, and method.name = 'fedavg' has none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _a_classifier_gives_classes(self) -> "Config":
        if self.model.head == "causal":
            return self
        given = [("method.objective", self.method.objective)]
        given += [("evaluation.metrics", metric) for metric in self.evaluation.metrics]
        for key, found in given:
            if found not in ("loss", "accuracy"):
                raise ValueError(
                    f"{key} = {found!r} looks at tokens of an answer, and model.head = "
                    "'classification' gives a class; allowed are 'loss' and 'accuracy'"
                )
        if self.planning.budgets is not None:
            raise ValueError(
                f"planning.budgets = {self.planning.budgets!r} needs predictions of memory, which "
                "there are none of for model.head = 'classification'; use planning.active"
            )
        return self

    @model_validator(mode="after")
    def _accuracy_has_its_choices(self) -> "Config":
        if self.model.head == "classification":
            return self
        for key, wanted in (
            ("method.objective = 'accuracy'", self.method.objective == "accuracy"),
            ("evaluation.metrics with 'accuracy'", "accuracy" in self.evaluation.metrics),
        ):
            if wanted and self.data.label_words is None:
                raise ValueError(
                    f"{key} needs data.label_words, the possible answers, as in "
                    'data.label_words = { 0 = " terrible", 1 = " great" }; for free answers there '
                    "are 'exact-match', 'f1' and 'rougeL', and for classes model.head = "
                    "'classification'"
                )
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> "Config":
        method = self.method
        if method.mask == "none":
            return self
        if method.mask == "small" and self.model.tune == "lora":
            raise ValueError(
                "method.mask = 'small' looks at the magnitude of weights, and an adapter's factors "
                "begin at 0; use 'random', or model.tune = 'full'"
            )
        if method.name == "fedavg" or method.strategy == "update-difference":
            what = "method.name" if method.name == "fedavg" else "method.strategy"
            found = method.name if method.name == "fedavg" else method.strategy
            raise ValueError(
                f"method.mask = {method.mask!r} does not go with {what} = {found!r}, which moves "
                "or measures all tuned weights"
            )
        return self

    @model_validator(mode="after")
    def _server_can_do_it(self) -> "Config":
        name, server = self.method.name, self.server
        if name == "fedavg" and not (server.plain and not server.normalise):
            raise ValueError(
                "the [server] section works on steps, and method.name = 'fedavg' has tensors; "
                "leave it out"
            )
        if self.method.pool and not server.plain:
            raise ValueError(
                f"server.learning_rate, server.decay and server.momentum change what method.name = "
                f"{name!r} keeps as exact sums over candidate seeds; leave them at 1, 1 and 0"
            )
        window = server.window if server.momentum else 1
        if self.federation.clients * window > MOST_COUNTED:
            raise ValueError(
                f"federation.clients = {self.federation.clients} times server.window = {window} is "
                f"above the {MOST_COUNTED} contributions that a ledger round holds"
            )
        return self

    @model_validator(mode="after")
    def _planning_is_for_blocks(self) -> "Config":
        planning, clients = self.planning, self.federation.clients
        given = planning.budgets is not None or planning.active is not None
        if given and self.method.name != "zorba":
            raise ValueError(
                f"planning.{'active' if planning.budgets is None else 'budgets'} says which blocks "
                f"zorba allots to a client, and method.name is {self.method.name!r}; leave it out"
            )
        for key, found in (("budgets", planning.budgets), ("active", planning.active)):
            if isinstance(found, list) and len(found) != clients:
                raise ValueError(
                    f"planning.{key} has {len(found)} entries for federation.clients = {clients}; "
                    "give one for each client"
                )
        return self

    @model_validator(mode="after")
    def _simulated_clients_exist(self) -> "Config":
        if self.simulation.slow and self.federation.deadline is None:
            raise ValueError(
                f"simulation.slow = {self.simulation.slow} is the chance of a report after "
                "federation.deadline, which is not set"
            )
        if self.simulation.late >= self.federation.clients:
            raise ValueError(
                f"simulation.late = {self.simulation.late} leaves none of federation.clients = "
                f"{self.federation.clients} to begin with"
            )
        if self.method.name == "fedavg" and self.simulation != SimulationSection():
            raise ValueError(
                "the [simulation] section is for methods whose clients send scalars; with "
                "method.name = 'fedavg' leave it out"
            )
        return self

    @model_validator(mode="after")
    def _partition_has_a_field(self) -> "Config":
        if self.federation.partition != "iid" and not self.federation.field:
            raise ValueError(
                f"federation.partition = {self.federation.partition!r} needs federation.field, "
                "the field of the data to divide by"
            )
        return self


Sections = TypeVar("Sections", bound=Section)


def sections_of(kind: type[Section]) -> dict[str, type[Section]]:
    """The sections of a configuration file, by name."""
    return {name: cast(type[Section], f.annotation) for name, f in kind.model_fields.items()}


SECTIONS = sections_of(Config)


def _check_name(name: str, known: Sequence[str]) -> None:
    """Refuse what is neither a known name nor the form of a user's function."""
    if name in known or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", name):
        return
    near = difflib.get_close_matches(name, known, n=1)
    raise ValueError(
        f"{name!r} is not known.{f' Did you mean {near[0]!r}?' if near else ''} Allowed are "
        f"{', '.join(map(repr, known))}, or a function of your own as 'package.module:function'"
    )


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `section.key=value` overrides.

    Relative paths of `model.path` and `data.source` are taken from the working directory.

    Raises:
        FedForwardError: no such file, not TOML, or a key or value that is not legal.
    """
    return validate(read_toml(path, overrides), str(path))


def read_toml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a TOML file with `section.key=value` overrides, nothing checked yet.

    Raises:
        FedForwardError: no such file, not TOML, or an override that is none.
    """
    if not path.is_file():
        raise FedForwardError(
            f"{path}: no such configuration file. `fedforward init` writes a commented example."
        )
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FedForwardError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        # Bytes that are not UTF-8 and numbers of thousands of digits are ValueErrors too.
        raise FedForwardError(f"{path} is not valid TOML: {error}.") from error
    for override in overrides:
        section, key, value = parse_override(override)
        if not isinstance(content.setdefault(section, {}), dict):
            raise FedForwardError(f"{path}: {section} must be a section, written [{section}].")
        content[section][key] = value
    return content


def parse_override(text: str) -> tuple[str, str, Any]:
    """("section", "key", value) of `section.key=value`; the value is TOML, or else a string."""
    name, equals, raw = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and section and key):
        raise FedForwardError(
            f"{text!r} is not an override. Write section.key=value, as in federation.rounds=50."
        )
    try:
        content = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return section, key, raw
    # Text with a line break may read as a second key.
    return section, key, content["value"] if len(content) == 1 else raw


def validate(content: Mapping[str, Any], origin: str = "configuration") -> Config:
    """A `Config` from nested dictionaries.

    Raises:
        FedForwardError: with a line for each thing that is wrong.
    """
    return validate_as(Config, content, origin)


def validate_as(kind: type[Sections], content: Mapping[str, Any], origin: str) -> Sections:
    """A file of sections of any kind; see `validate`."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        sections = sections_of(kind)
        # A value that fits no branch of a union is a problem for each branch; one is enough.
        problems = list(
            {
                problem["loc"][:2]: _sentence(problem, sections) for problem in error.errors()[::-1]
            }.values()
        )[::-1]
        head = f"{origin}: " if len(problems) == 1 else f"{origin}:\n  "
        raise FedForwardError(head + "\n  ".join(problems)) from error


def _sentence(problem: Any, sections: Mapping[str, type[Section]]) -> str:
    """One validation problem in the user's words."""
    # What follows section and key is pydantic's: a branch of a union, a place in a list.
    location = [str(part) for part in problem["loc"][:2]]
    key, kind, found = ".".join(location), problem["type"], problem["input"]
    if kind == "string_unicode" and len(location) < 2:
        # Only a site's JSON can have such keys; a file cannot.
        return f"a key in {key or 'it'} is not text: {found!r}."
    if kind == "extra_forbidden":
        legal = list(sections if len(location) == 1 else sections[location[0]].model_fields)
        near = difflib.get_close_matches(location[-1], legal, n=1)
        hint = f" Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        what = "section" if len(location) == 1 else "key"
        return f"{key} is not a known {what}.{hint} Allowed are {', '.join(legal)}."
    if kind == "missing":
        if len(location) == 1:
            return f"the section [{key}] is missing. `fedforward init` writes a commented example."
        field = sections[location[0]].model_fields[location[1]]
        return f"{key} is missing ({field.description})."
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}." if key else f"{problem['ctx']['error']}."
    if kind in ("model_type", "model_attributes_type"):
        return f"{key} = {found!r} must be a section, written [{key}]."
    field = sections[location[0]].model_fields[location[1]]
    return f"{key} = {found!r} is not allowed: {_allowed(field)}."


def _allowed(field: Any) -> str:
    """What a key takes, from its declared type."""
    annotation = field.annotation
    choices = [a for a in get_args(annotation) if isinstance(a, str)]
    if get_origin(annotation) is Literal and choices:
        return "it must be one of " + ", ".join(repr(choice) for choice in choices)
    limits = []
    for constraint in _constraints(field):
        for name, word in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
            if getattr(constraint, name, None) is not None:
                limits.append(f"{word} {getattr(constraint, name)}")
    types = str(annotation)
    noun = "a whole number" if "int" in types and "float" not in types else "a number"
    if "str" in types:
        noun = "text or a list of texts" if "list" in types else "text in quotes"
        noun = "a list of texts" if types == "list[str]" else noun
        noun = "a table of texts such as { 0 = ' no', 1 = ' yes' }" if "dict" in types else noun
        noun = "text or a list of whole numbers" if "list[int]" in types else noun
    elif "list[int]" in types:
        noun = "a list of whole numbers"
    elif "bool" in types:
        noun = "true or false"
    return f"it must be {noun}" + (f", {' and '.join(limits)}" if limits else "")


def _constraints(field: Any) -> list[Any]:
    found = list(field.metadata)
    for argument in get_args(field.annotation):
        for extra in getattr(argument, "__metadata__", ()):
            found += getattr(extra, "metadata", [extra])
    return found


def to_toml(config: Config) -> str:
    """The configuration as TOML, every key written out, values exactly as they are."""
    lines = []
    for section, values in config.model_dump(exclude_none=True).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A value of a configuration as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{toml_value(key)} = {toml_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }" if value else "{}"
    if isinstance(value, str):
        # TOML's basic strings take JSON's escapes, once the delete character is escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def example() -> str:
    """A commented configuration with every key, for `fedforward init`."""
    return example_of(
        Config,
        "# A fedforward run: `fedforward run THIS_FILE`. Commented keys show their defaults.",
    )


def example_of(kind: type[Section], head: str) -> str:
    """A commented file with every key of a kind of configuration."""
    given = {
        "model.path": '"path/to/model"',
        "data.source": '"data.jsonl"',
    }
    lines = [head, ""]
    for section, part in sections_of(kind).items():
        lines.append(f"[{section}]")
        for key, field in part.model_fields.items():
            choices = [a for a in get_args(field.annotation) if isinstance(a, str)]
            listed = "" if not choices else " (" + " | ".join(choices) + ")"
            lines.append(f"# {field.description}{listed}")
            if f"{section}.{key}" in given:
                lines.append(f"{key} = {given[f'{section}.{key}']}")
            elif field.default is None:
                lines.append(f"# {key} =")
            else:
                lines.append(f"# {key} = {toml_value(field.default)}")
        lines.append("")
    return "\n".join(lines)
