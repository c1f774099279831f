"""The run of the public face: a model, data and a method in, a run directory and a result out.

It writes down a configuration of what it is given and carries that out, so that a run that was
made in Python resumes, verifies and exports like one that began with a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.registry import AGGREGATORS, ESTIMATORS, METHODS
from fedforward.data.corpus import Prompt
from fedforward.data.sampler import Batches
from fedforward.methods.base import Method
from fedforward.methods.parameters import parameters_of
from fedforward.models.base import CausalModel
from fedforward.models.full import FullModel
from fedforward.models.loading import longest_sequence
from fedforward.models.lora import LoraModel
from fedforward.training import build
from fedforward.training.assembly import build_method
from fedforward.training.metrics import ProgressCallback
from fedforward.training.run import Run
from fedforward.training.summary import RunSummary

Model = LoraModel | FullModel
#: Tokens of an example, unless it is said.
MAX_SEQUENCE = 512


@dataclass(frozen=True)
class Dataset:
    """Rows of a file or hub data set, how they become text, and how clients share them.

    Attributes:
        data: the keys of the section `[data]`.
        federation: the keys of the section `[federation]` that divide the rows.

    Example:
        >>> rows = Dataset.from_file("rows.jsonl", prompt="Q: {q}\\nA:", answer=" {a}")
        >>> rows.partition(clients=4, by="site").federation["partition"]
        'by-field'
    """

    data: Mapping[str, Any]
    federation: Mapping[str, Any]

    @classmethod
    def from_file(
        cls,
        source: str | Path | Sequence[str | Path],
        *,
        prompt: str | None = None,
        answer: str | None = None,
        heldout: float = 0.01,
        **more: Any,
    ) -> "Dataset":
        """Rows of files (.jsonl .json .csv .tsv .parquet .arrow) or hub data sets.

        Without `prompt` and `answer` the data must hold conversations (see the key `data.chat`).

        Args:
            source: a file, folder or pattern of files, a hub name, or several of them.
            prompt: template; {name} stands for a field.
            answer: template; only its tokens count in the loss.
            heldout: share of the rows (below 1) or their number, kept for evaluation.
            more: other keys of the section `[data]`, such as `label_words` or `sequence_length`.
        """
        share = float(heldout) if isinstance(heldout, int) else heldout
        names = str(source) if isinstance(source, str | Path) else list(map(str, source))
        data = {"source": names, "prompt": prompt, "answer": answer, "heldout": share, **more}
        return cls({key: value for key, value in data.items() if value is not None}, {"clients": 1})

    def partition(
        self, clients: int, *, by: str | None = None, alpha: float | None = None
    ) -> "Dataset":
        """The rows divided among clients.

        Args:
            clients: how many.
            by: field whose values are kept together, or, with `alpha`, drawn unevenly; None
                divides the rows at random.
            alpha: of a Dirichlet partition by that field; small is uneven.
        """
        federation: dict[str, Any] = {"clients": clients}
        if by is not None:
            federation |= {"partition": "by-field", "field": by}
        if alpha is not None:
            federation |= {
                "partition": "dirichlet",
                "alpha": float(alpha) if isinstance(alpha, int) else alpha,
            }
        return replace(self, federation=federation)

    def section(self, model: Model) -> dict[str, Any]:
        """The section `[data]`; sequences are as long as the model takes, and at most 512."""
        longest = longest_sequence(model.network) or MAX_SEQUENCE
        return {"sequence_length": min(MAX_SEQUENCE, longest), **self.data}

    def batches(self, model: Model, batch_size: int = 8) -> Batches:
        """The endless stream of batches of all training rows, addressable by step.

        Raises:
            FedForwardError: for whatever is wrong with the data.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise FedForwardError(
                f"batch_size = {batch_size!r} is not allowed: it must be a whole number from 1."
            )
        sections = {**model.settings, "data": self.section(model)}
        config = validate({**sections, "federation": {"clients": 1}})
        corpus = build.corpus_reader(config).corpus(
            model.tokenizer, longest_sequence(model.network)
        )
        seed = config.run.seed
        return Batches(corpus.clients[0], batch_size=batch_size, run_seed=seed, client=0)


class Simulation:
    """A federation on one machine.

    Example:
        See `examples/library_use.py`.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        method: Method,
        /,
        *,
        learning_rate: float | Literal["auto"] = "auto",
        out: str | Path,
        batch_size: int = 1,
        **sections: Mapping[str, Any],
    ) -> None:
        """Note what is to be run; nothing is read or written before `fit`.

        Args:
            model: of `from_pretrained`, at its base weights.
            data: partitioned rows.
            method: its run seed is the model's, whatever the object says.
            learning_rate: η_0; "auto" finds it.
            out: the run directory.
            batch_size: examples of a step.
            sections: further keys of a configuration, by section, as in
                `run={"evaluate_every": 5}` or `method={"report_filters": ["clip:0.5"]}`.

        Raises:
            FedForwardError: a key or value is not legal, or the parts do not fit.
        """
        _check_parts(model, data, method)
        self.model = model
        self.out = Path(out)
        own = _method_section(method) | {"learning_rate": learning_rate, "batch_size": batch_size}
        self._content: dict[str, dict[str, Any]] = {}
        own_parts = {"data": data.section(model), "federation": data.federation, "method": own}
        for part in (model.settings, own_parts):
            for section, values in part.items():
                self._content.setdefault(section, {}).update(values)
        for section, values in sections.items():
            self._add(section, values)
        rebuilt = build_method(self._config(1))
        if _described(rebuilt) != _described(method):
            raise FedForwardError(
                f"{type(method).__name__} cannot be written down as it is, so the run could not be "
                f"replayed: a configuration makes {rebuilt!r} of it, and it is {method!r}. An "
                "estimator has `directions` and `mu` only; what else it needs belongs to a "
                "`parameter` of the method."
            )

    def _add(self, section: str, values: Mapping[str, Any]) -> None:
        """Take over further keys of a section, none of which the parts have said already."""
        if not isinstance(values, Mapping):
            raise FedForwardError(
                f"ff.Simulation: {section} = {values!r} is not allowed: it must be the keys of the "
                f"section [{section}], as in {section}={{...}}."
            )
        content = self._content.setdefault(section, {})
        for key, value in values.items():
            if section == "federation" and key == "rounds":
                raise FedForwardError(
                    "ff.Simulation: federation.rounds is said in fit(rounds=...)."
                )
            if section in ("model", "lora") and key not in content:
                raise FedForwardError(
                    f"ff.Simulation: {section}.{key} = {value!r} comes too late: the model is made "
                    "already. Say it in from_pretrained, or use `fedforward run`."
                )
            if key in content and content[key] != value:
                raise FedForwardError(
                    f"ff.Simulation: {section}.{key} = {value!r} is not allowed: the model, the "
                    f"data or the method says {content[key]!r} already. Say it there."
                )
            content[key] = value

    def _config(self, rounds: int) -> Config:
        federation = self._content["federation"] | {"rounds": rounds}
        return validate({**self._content, "federation": federation}, "ff.Simulation")

    def fit(
        self, rounds: int, *, resume: bool = False, progress: ProgressCallback | None = None
    ) -> "Result":
        """Carry the run out to so many rounds, and write the run directory.

        Args:
            rounds: T, those of an earlier `fit` that is resumed included.
            resume: go on with the run that is in the directory.
            progress: called after each round with its number, all rounds and its metrics line.

        Raises:
            FedForwardError: for whatever is wrong with the data; the directory is in use.
            DivergenceError: after the results so far have been written.
        """
        self.model.reset()
        built: tuple[CausalModel, Any] = (self.model, self.model.tokenizer)
        run = Run(self._config(rounds), self.out, resume, progress, built)
        summary = run.fit()
        lines = run.directory.read_metrics(summary.rounds)
        return Result(self.model, self.out, summary, _history(lines), run.corpus.continued)


@dataclass(frozen=True)
class Result:
    """What a run has led to.

    Attributes:
        model: at the tuned weights.
        directory: of the run.
        summary: as in `summary.json`.
        history: by name of a figure, one value for each round that has it, the base model first;
            `history["round"]` numbers all lines.
        continued: makes the prompt of a text as the run's examples have it.
    """

    model: Model
    directory: Path
    summary: RunSummary
    history: Mapping[str, Sequence[Any]]
    continued: Callable[[str], Prompt] | None = None

    def save_adapter(self, folder: str | Path) -> Path:
        """Write what was tuned: a PEFT adapter, or the whole model under full tuning."""
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise FedForwardError(f"{path} is a file; give a folder to write the adapter to.")
        self.model.save(path)
        return path

    def answer(self, prompt: str, most_tokens: int = 48) -> str:
        """The tuned model's greedy answer to a prompt; of a chat, to a message of the user."""
        given = prompt if self.continued is None else self.continued(prompt).tokens
        return build.answer(self.model, self.model.tokenizer, given, most_tokens)


def _check_parts(model: Any, data: Any, method: Any) -> None:
    """Refuse parts of another kind.

    Raises:
        FedForwardError: which one, and what belongs there.
    """
    if not getattr(model, "settings", None):
        raise FedForwardError(
            "ff.Simulation takes a model of LoraModel.from_pretrained or "
            "FullModel.from_pretrained, which knows where it came from."
        )
    if not isinstance(data, Dataset):
        raise FedForwardError(
            f"ff.Simulation takes a Dataset, and {data!r} is none. Write "
            "ff.Dataset.from_file(source, prompt=..., answer=...)."
        )
    if not isinstance(method, Method):
        raise FedForwardError(
            f"ff.Simulation takes a method, and {method!r} is none. Write one with its settings, "
            "as in ff.FedMeZO(local_steps=10)."
        )


def _described(method: Method) -> tuple[Any, ...]:
    """What two methods that do the same have in common; the run seed aside."""
    own = [getattr(method, name) for name in parameters_of(type(method))]
    estimator = method.estimator
    state = getattr(estimator, "__dict__", None) or repr(estimator)
    return (type(method), method.local_steps, method.aggregator, type(estimator), state, *own)


def _method_section(method: Method) -> dict[str, Any]:
    """The keys of `[method]` that make the same method."""
    kind, estimator = METHODS.name_of(type(method)), method.estimator
    if kind not in METHODS:
        raise FedForwardError(
            f"{type(method).__name__} has no name that a run could be replayed with. Register it: "
            "@METHODS.register('my-method'), or an entry point of the group fedforward.methods."
        )
    for registry, name in (
        (ESTIMATORS, ESTIMATORS.name_of(type(estimator))),
        (AGGREGATORS, AGGREGATORS.name_of(method.aggregator)),
    ):
        if name not in registry:
            raise FedForwardError(
                f"The {registry.kind} {name} has no name that a run could be replayed with. "
                f"Register it, or give it an entry point of the group {registry.group}."
            )
    section = {
        "name": kind,
        "local_steps": method.local_steps,
        "estimator": ESTIMATORS.name_of(type(estimator)),
        "directions": estimator.directions,
        "aggregator": AGGREGATORS.name_of(method.aggregator),
    }
    if hasattr(estimator, "mu"):
        section["mu"] = float(estimator.mu)
    return section | {name: getattr(method, name) for name in parameters_of(type(method))}


def _history(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    history: dict[str, list[Any]] = {}
    for line in lines:
        for name, value in {**line, **line.get("metrics", {})}.items():
            history.setdefault(name, []).append(value)
    return history
