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
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fedforward.errors import FedForwardError
from fedforward.units import parse_bytes

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
#: What a report or a ledger entry counts in 16 bits: clients, and the steps of a round.
MOST_COUNTED = 65535
#: What `method.objective` takes beside a user's function, and `evaluation.metrics` beside those.
OBJECTIVES = ("loss", "accuracy", "exact-match", "f1", "rougeL")
METRICS = ("loss", "perplexity", "accuracy", "exact-match", "f1", "rougeL")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """[model]"""

    path: str = Field(description="folder in Hugging Face format, or a hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights as they are held in memory"
    )
    tune: Literal["lora", "full"] = Field("lora", description="what the run changes")
    blocks: str | list[int] = Field(
        "all", description='transformer blocks that are tuned: "all", "8-15" or [0, 5], from 0'
    )
    quantization: Literal["none", "nf4"] = Field(
        "none", description="of a frozen base's linear layers: 4 bits through bitsandbytes"
    )
    device_map: Literal["none", "auto"] = Field(
        "none", description='"auto" spreads a frozen base over all CUDA devices and host memory'
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
    def _only_a_frozen_base_is_packed(self) -> "ModelSection":
        for key, value in (("quantization", self.quantization), ("device_map", self.device_map)):
            if self.tune == "full" and value != "none":
                raise ValueError(
                    f"{key} = {value!r} is for a frozen base, and tune = 'full' changes every "
                    f"weight; use tune = 'lora' or {key} = 'none'"
                )
        return self


class LoraSection(_Section):
    """[lora]"""

    rank: Count = Field(8, description="r")
    alpha: Positive = Field(16.0, description="the product BA is scaled by alpha / rank")
    targets: str | list[str] = Field(
        "all-linear", description='"all-linear", or names such as ["q_proj", "v_proj"]'
    )
    factors: Literal["both", "B"] = Field("both", description='"B" keeps the initial A')


class DataSection(_Section):
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

    @field_validator("label_words")
    @classmethod
    def _words_can_be_told_apart(cls, words: dict[str, str] | None) -> dict[str, str] | None:
        if words is not None and (len(words) < 2 or len(set(words.values())) < len(words)):
            raise ValueError(
                f"{words!r} is not allowed: it must be two or more different words by the values "
                'that they stand for, as in { 0 = " terrible", 1 = " great" }'
            )
        return words


class EvaluationSection(_Section):
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

    @field_validator("metrics")
    @classmethod
    def _metrics_are_known(cls, metrics: list[str]) -> list[str]:
        for place, metric in enumerate(metrics):
            _check_name(metric, METRICS)
            if metric in metrics[:place]:
                raise ValueError(f"{metric!r} is there twice; leave one of them out")
        return metrics


class FederationSection(_Section):
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


class MethodSection(_Section):
    """[method]"""

    name: Literal["fedmezo", "fedavg"] = Field("fedmezo", description="the algorithm")
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


class RunSection(_Section):
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


class Config(_Section):
    """A whole configuration."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    evaluation: EvaluationSection = EvaluationSection()
    federation: FederationSection = FederationSection()
    method: MethodSection = MethodSection()
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
    def _budget_is_for_probes(self) -> "Config":
        if self.run.memory_budget is not None and self.method.name == "fedavg":
            raise ValueError(
                f"run.memory_budget = {self.run.memory_budget!r} says how many probes share a "
                "forward pass, and method.name = 'fedavg' has none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _accuracy_has_its_choices(self) -> "Config":
        for key, wanted in (
            ("method.objective = 'accuracy'", self.method.objective == "accuracy"),
            ("evaluation.metrics with 'accuracy'", "accuracy" in self.evaluation.metrics),
        ):
            if wanted and self.data.label_words is None:
                raise ValueError(
                    f"{key} needs data.label_words, the possible answers, as in "
                    'data.label_words = { 0 = " terrible", 1 = " great" }; for free answers there '
                    "are 'exact-match', 'f1' and 'rougeL'"
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


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelSection,
    "lora": LoraSection,
    "data": DataSection,
    "evaluation": EvaluationSection,
    "federation": FederationSection,
    "method": MethodSection,
    "run": RunSection,
}


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
    return validate(content, str(path))


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
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        # A value that fits no branch of a union is a problem for each branch; one is enough.
        problems = list(
            {problem["loc"][:2]: _sentence(problem) for problem in error.errors()[::-1]}.values()
        )[::-1]
        head = f"{origin}: " if len(problems) == 1 else f"{origin}:\n  "
        raise FedForwardError(head + "\n  ".join(problems)) from error


def _sentence(problem: Any) -> str:
    """One validation problem in the user's words."""
    # What follows section and key is pydantic's: a branch of a union, a place in a list.
    location = [str(part) for part in problem["loc"][:2]]
    key, kind, found = ".".join(location), problem["type"], problem["input"]
    if kind == "extra_forbidden":
        legal = list(SECTIONS) if len(location) == 1 else list(_fields(location[0]))
        near = difflib.get_close_matches(location[-1], legal, n=1)
        hint = f" Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        what = "section" if len(location) == 1 else "key"
        return f"{key} is not a known {what}.{hint} Allowed are {', '.join(legal)}."
    if kind == "missing":
        if len(location) == 1:
            return f"the section [{key}] is missing. `fedforward init` writes a commented example."
        return f"{key} is missing ({_fields(location[0])[location[1]].description})."
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}." if key else f"{problem['ctx']['error']}."
    if kind in ("model_type", "model_attributes_type"):
        return f"{key} = {found!r} must be a section, written [{key}]."
    return f"{key} = {found!r} is not allowed: {_allowed(location)}."


def _allowed(location: Sequence[str]) -> str:
    """What a key takes, from its declared type."""
    field = _fields(location[0])[location[1]]
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
        noun = "text or a list of whole numbers" if "list[int]" in types else noun
    return f"it must be {noun}" + (f", {' and '.join(limits)}" if limits else "")


def _constraints(field: Any) -> list[Any]:
    found = list(field.metadata)
    for argument in get_args(field.annotation):
        for extra in getattr(argument, "__metadata__", ()):
            found += getattr(extra, "metadata", [extra])
    return found


def _fields(section: str) -> dict[str, Any]:
    return dict(SECTIONS[section].model_fields)


def to_toml(config: Config) -> str:
    """The configuration as TOML, every key written out, values exactly as they are."""
    lines = []
    for section, values in config.model_dump(exclude_none=True).items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(items) + " }" if value else "{}"
    if isinstance(value, str):
        # TOML's basic strings take JSON's escapes, once the delete character is escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def example() -> str:
    """A commented configuration with every key, for `fedforward init`."""
    given = {
        "model.path": '"path/to/model"',
        "data.source": '"data.jsonl"',
    }
    lines = [
        "# A fedforward run: `fedforward run THIS_FILE`. Commented keys show their defaults.",
        "",
    ]
    for section, kind in SECTIONS.items():
        lines.append(f"[{section}]")
        for key, field in kind.model_fields.items():
            choices = [a for a in get_args(field.annotation) if isinstance(a, str)]
            listed = "" if not choices else " (" + " | ".join(choices) + ")"
            lines.append(f"# {field.description}{listed}")
            if f"{section}.{key}" in given:
                lines.append(f"{key} = {given[f'{section}.{key}']}")
            elif field.default is None:
                lines.append(f"# {key} =")
            else:
                lines.append(f"# {key} = {_toml_value(field.default)}")
        lines.append("")
    return "\n".join(lines)
