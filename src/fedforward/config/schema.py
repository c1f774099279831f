"""A run's configuration as a whole: its sections, and what two sections say of each other.

Rules of methods and estimators lie in `rules`, reading and writing in `loading` and `template`.
Imports neither PyTorch nor transformers.
"""

from typing import Any, cast

from pydantic import model_validator

from fedforward.config import rules
from fedforward.config.fields import MOST_COUNTED, Section
from fedforward.config.method_sections import (
    FederationSection,
    MethodSection,
    PlanningSection,
    PrivacySection,
    ServerSection,
)
from fedforward.config.run_section import RunSection
from fedforward.config.sections import DataSection, EvaluationSection, LoraSection, ModelSection
from fedforward.config.simulation import SimulationSection
from fedforward.core.registry import METHODS
from fedforward.methods.base import method_class


class Config(Section):
    """A whole configuration."""

    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    evaluation: EvaluationSection = EvaluationSection()
    federation: FederationSection = FederationSection()
    method: MethodSection = MethodSection()
    privacy: PrivacySection = PrivacySection()
    server: ServerSection = ServerSection()
    planning: PlanningSection = PlanningSection()
    simulation: SimulationSection = SimulationSection()
    run: RunSection = RunSection()

    @property
    def objective(self) -> str:
        """What a run optimises: what is asked for, or what fits its data.

        A sequence classifier's cross-entropy over its classes is its loss.
        """
        asked = self.method.objective
        if self.model.head == "classification":
            return "loss" if asked in (None, "choice") else asked
        return asked or ("choice" if self.data.label_words else "loss")

    def with_objective(self, name: str | None = None) -> "Config":
        """The configuration with its objective written out.

        Args:
            name: where the configuration leaves it open; None is the default of today.
        """
        objective = name if name and self.method.objective is None else self.objective
        method = self.method.model_copy(update={"objective": objective})
        return self.model_copy(update={"method": method})

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, content: Any) -> Any:
        """What a method sets where the configuration says nothing."""
        method = content.get("method") if isinstance(content, dict) else None
        name = method.get("name") if isinstance(method, dict) else None
        if not isinstance(name, str) or name not in METHODS:
            return content
        kind, model = method_class(name), content.get("model")
        wanted = {section: dict(values) for section, values in kind.defaults.items()}
        model = model if isinstance(model, dict) else {}
        if model.get("tune", "lora") == "lora":
            wanted.setdefault("method", {}).update(kind.lora_defaults)
        else:
            wanted.pop("lora", None)
        stored = model.get("adapter") is not None
        if "lora" in wanted and stored:
            # An adapter has an A of its own.
            wanted["lora"].pop("init", None)
        if wanted.get("lora", {}).get("factors") == "R" and (
            stored or model.get("head") == "classification"
        ):
            wanted["lora"]["factors"] = "B"
        filled = dict(content)
        for section, values in wanted.items():
            given = filled.get(section, {})
            if isinstance(given, dict):
                filled[section] = {**values, **given}
        return filled

    @property
    def metrics(self) -> tuple[str, ...]:
        """What a run measures: what it optimises (unless the loss), and what is asked for."""
        objective, asked = self.objective, self.evaluation.metrics
        return tuple(asked) if objective in ("loss", *asked) else (objective, *asked)

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
    def _budget_is_measured_on_the_device(self) -> "Config":
        if self.model.offload == "host" and self.run.memory_budget is not None:
            raise ValueError(
                f"run.memory_budget = {self.run.memory_budget!r} is measured with every block on "
                "the device, and model.offload = 'host' is for models that do not fit like that; "
                "leave it out and set run.probes_per_call"
            )
        return self

    @model_validator(mode="after")
    def _a_classifier_gives_classes(self) -> "Config":
        if self.model.head == "causal":
            return self
        given = [("method.objective", self.objective)]
        given += [("evaluation.metrics", metric) for metric in self.evaluation.metrics]
        for key, found in given:
            if found not in ("loss", "choice", "accuracy"):
                raise ValueError(
                    f"{key} = {found!r} looks at tokens of an answer, and model.head = "
                    "'classification' gives a class; allowed are 'loss', 'choice' (the same) and "
                    "'accuracy'"
                )
        if self.planning.budgets is not None:
            raise ValueError(
                f"planning.budgets = {self.planning.budgets!r} needs predictions of memory, which "
                "there are none of for model.head = 'classification'; use planning.active"
            )
        return self

    @model_validator(mode="after")
    def _classes_are_of_a_classifier(self) -> "Config":
        if self.data.classes is not None and self.model.head == "causal":
            raise ValueError(
                f"data.classes = {self.data.classes!r} names what model.head = 'classification' "
                "gives; set that, or use data.label_words for the answers of a causal model"
            )
        return self

    @model_validator(mode="after")
    def _choices_are_given(self) -> "Config":
        if self.model.head == "classification" or self.data.label_words is not None:
            return self
        for name in ("choice", "accuracy"):
            for key, wanted in (
                (f"method.objective = {name!r}", self.method.objective == name),
                (f"evaluation.metrics with {name!r}", name in self.evaluation.metrics),
            ):
                if wanted:
                    raise ValueError(
                        f"{key} needs data.label_words, the possible answers, as in "
                        'data.label_words = { 0 = " terrible", 1 = " great" }; for free answers '
                        "there are the objective 'loss' and 'exact-match', 'f1' and 'rougeL', and "
                        "for classes model.head = 'classification'"
                    )
        return self

    @model_validator(mode="after")
    def _small_weights_are_there(self) -> "Config":
        if self.method.mask == "small" and self.model.tune == "lora":
            raise ValueError(
                "method.mask = 'small' looks at the magnitude of weights, and an adapter's factors "
                "begin at 0; use 'random', or model.tune = 'full'"
            )
        return self

    @model_validator(mode="after")
    def _aligned_adapters_are_new_ones(self) -> "Config":
        if self.lora.init == "aligned" and self.model.tune == "full":
            raise ValueError(
                "lora.init = 'aligned' is of adapters, and model.tune = 'full' has none; use "
                "model.tune = 'lora', or leave lora.init out"
            )
        if self.lora.init == "aligned" and self.model.adapter is not None:
            raise ValueError(
                f"lora.init = 'aligned' gives new adapters their A, and model.adapter = "
                f"{self.model.adapter!r} has an A of its own; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _r_is_of_new_adapters_of_causal_models(self) -> "Config":
        if self.lora.factors != "R":
            return self
        for key, given in (
            ("model.head = 'classification'", self.model.head == "classification"),
            (f"model.adapter = {self.model.adapter!r}", self.model.adapter is not None),
        ):
            if given:
                raise ValueError(
                    "lora.factors = 'R' is of new adapters of a causal language model, and "
                    f"{key} is given; use lora.factors = 'B', or 'both'"
                )
        return self

    @model_validator(mode="after")
    def _a_ledger_round_holds_the_window(self) -> "Config":
        window = self.server.window if self.server.momentum else 1
        if self.federation.clients * window > MOST_COUNTED:
            raise ValueError(
                f"federation.clients = {self.federation.clients} times server.window = {window} is "
                f"above the {MOST_COUNTED} contributions that a ledger round holds"
            )
        return self

    @model_validator(mode="after")
    def _planning_is_for_every_client(self) -> "Config":
        planning, clients = self.planning, self.federation.clients
        for key, found in (("budgets", planning.budgets), ("active", planning.active)):
            if isinstance(found, list) and len(found) != clients:
                raise ValueError(
                    f"planning.{key} has {len(found)} entries for federation.clients = {clients}; "
                    "give one for each client"
                )
        return self

    @model_validator(mode="after")
    def _simulated_clients_exist(self) -> "Config":
        if self.simulation.straggler and self.federation.deadline is None:
            raise ValueError(
                f"simulation.straggler = {self.simulation.straggler} is the chance of a report "
                "after federation.deadline, which is not set"
            )
        if self.simulation.late_join >= self.federation.clients:
            raise ValueError(
                f"simulation.late_join = {self.simulation.late_join} leaves none of "
                f"federation.clients = {self.federation.clients} to begin with"
            )
        return self

    @model_validator(mode="after")
    def _attackers_are_clients_with_labels(self) -> "Config":
        given, clients = self.simulation, self.federation.clients
        unknown = [client for client in given.attackers if client >= clients]
        if unknown:
            raise ValueError(
                f"simulation.attackers = {given.attackers!r} names client {unknown[0]}, and "
                f"federation.clients = {clients} are numbered from 0 to {clients - 1}"
            )
        classes = self.data.label_words is not None or self.model.head == "classification"
        if given.attack == "label-flip" and not classes:
            raise ValueError(
                "simulation.attack = 'label-flip' exchanges labels, and free answers have none; "
                "set data.label_words or model.head = 'classification', or choose another attack"
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

    @model_validator(mode="after")
    def _method_goes_with_the_rest(self) -> "Config":
        for sentence in rules.rules(self):
            raise ValueError(sentence)
        return self


def sections_of(kind: type[Section]) -> dict[str, type[Section]]:
    """The sections of a configuration file, by name."""
    return {name: cast(type[Section], f.annotation) for name, f in kind.model_fields.items()}
