"""Who is told of a run's figures as they come: a CSV file, TensorBoard, Weights & Biases.

`run.callbacks` names them. A callback is told of every line of the metrics, those of an earlier
start first, so that what it writes is whole after a kill. It has numbers only: no text of the data,
no paths and no names of sites. One that fails is left out, and the run goes on. Imports no PyTorch.
"""

import csv
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from fedforward.config.schema import Config
from fedforward.core.errors import FedForwardError
from fedforward.core.registry import CALLBACKS
from fedforward.training.run_directory import write_text

LOGGER = logging.getLogger("fedforward.training.callbacks")
#: Of a line, what is no figure of a round.
_TEXTS = {"example", "state_digest"}
#: What has figures of its own below it, none of them of a single site.
_NESTED = {"bytes", "clients", "metrics", "medians"}
#: Sections that are sent to where runs are compared; others name files and fields of the data.
_PUBLIC = ("lora", "federation", "method", "server", "privacy")
_OF_DATA = {"field", "init_file", "mask_file"}


class Callback(Protocol):
    """One that is told of a run; made without arguments.

    A class may name in `needs` the package that it imports.
    """

    def begin(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """A run begins or goes on.

        Args:
            folder: of the run.
            lines: of the metrics that are there, the base model's first.
        """
        ...

    def line(self, line: Mapping[str, Any]) -> None:
        """A round is over.

        The last one is told again where it is measured only when the run ends.
        """
        ...

    def end(self) -> None:
        """The run is over, or was stopped."""
        ...


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics, by a path of names; learning rates as their mean.

    Example:
        >>> figures({"round": 1, "bytes": {"up": 8.0}, "learning_rates": {0: 1.0, 1: 3.0}})
        {'round': 1, 'bytes/up': 8.0, 'learning_rate': 2.0}
    """
    found: dict[str, float] = {}
    for name, value in line.items():
        if name == "learning_rates":
            if value:
                found["learning_rate"] = sum(value.values()) / len(value)
        elif isinstance(value, Mapping) and name in _NESTED:
            found |= {f"{name}/{key}": part for key, part in figures(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


class CsvFile:
    """`figures.csv` in the run's folder: a row for each round, a column for each figure."""

    def begin(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """See `Callback`."""
        self._path = folder / "figures.csv"
        self._rows = [figures(line) for line in lines]
        self._columns: list[str] = []
        self._write()

    def line(self, line: Mapping[str, Any]) -> None:
        """See `Callback`."""
        row = figures(line)
        if self._rows and self._rows[-1]["round"] == row["round"]:
            self._rows[-1] = row
            self._write()
            return
        self._rows.append(row)
        if row.keys() <= set(self._columns):
            with self._path.open("a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        else:
            # Metrics of held-out examples come with the first evaluation.
            self._write()

    def end(self) -> None:
        """See `Callback`."""

    def _write(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self._rows for name in row))
        text = _Lines()
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(self._rows)
        write_text(self._path, "".join(text.lines))


class _Lines:
    """What `csv` writes to."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> None:
        self.lines.append(text)


class TensorBoard:
    """Scalars for TensorBoard in `tensorboard/` of the run's folder."""

    needs: ClassVar[str] = "tensorboard"

    def begin(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """See `Callback`."""
        from tensorboard.summary import Writer

        own = folder / "tensorboard"
        # All lines are written again.
        shutil.rmtree(own, ignore_errors=True)
        self._writer = Writer(str(own))
        self._told: tuple[int, set[str]] = (-1, set())
        for line in lines:
            self.line(line)

    def line(self, line: Mapping[str, Any]) -> None:
        """See `Callback`."""
        found = figures(line)
        step = int(found.pop("round"))
        told = self._told[1] if self._told[0] == step else set()
        for name in found.keys() - told:
            self._writer.add_scalar(name, found[name], step)
        self._told = step, told | found.keys()
        self._writer.flush()

    def end(self) -> None:
        """See `Callback`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; `WANDB_MODE` and its other variables hold.

    Of the configuration it is told the sections that name nothing of the data.
    """

    needs: ClassVar[str] = "wandb"

    def begin(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """See `Callback`."""
        import wandb

        name = folder / "wandb.id"
        if not name.is_file():
            write_text(name, uuid4().hex[:12])
        content = config.model_dump(mode="json")
        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            host="",
            silent=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project="fedforward",
            id=name.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(folder),
            config={section: _public(content[section]) for section in _PUBLIC},
            settings=settings,
        )
        for line in lines:
            self.line(line)

    def line(self, line: Mapping[str, Any]) -> None:
        """See `Callback`."""
        found = figures(line)
        step = int(found.pop("round"))
        if step >= self._run.step:
            self._run.log(found, step=step)

    def end(self) -> None:
        """See `Callback`."""
        self._run.finish()


def _public(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section without what names a file or a field, which texts of a package's own may do."""
    found = {key: value for key, value in section.items() if key not in _OF_DATA}
    if "parameters" in found:
        numbers = {k: v for k, v in found["parameters"].items() if isinstance(v, int | float)}
        found["parameters"] = numbers
    return found


def _package_of(name: str, needs: str) -> str:
    """What brings the package that a callback needs; of another's callback, that package."""
    return f"'fedforward[{name}]'" if name in ("tensorboard", "wandb") else needs


class Callbacks:
    """Those of a run, none of which may end it.

    Example:
        >>> Callbacks(["csv"]).names
        ['csv']
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Make them.

        Raises:
            FedForwardError: there is none of a name, or the package that it needs is not here.
        """
        self._told: dict[str, Callback] = {}
        for name in names:
            try:
                kind = CALLBACKS.get(name)
            except FedForwardError as error:
                raise FedForwardError(f"run.callbacks: {error}") from error
            needs = getattr(kind, "needs", None)
            if needs is not None and find_spec(needs) is None:
                raise FedForwardError(
                    f"run.callbacks: {name!r} needs the package {needs}, which is not installed. "
                    f"Install it: pip install {_package_of(name, needs)}."
                )
            self._told[name] = kind()

    @property
    def names(self) -> list[str]:
        """Of those that have not failed."""
        return list(self._told)

    def begin(self, config: Config, folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
        """See `Callback`."""
        self._tell("begin", config, folder, lines)

    def line(self, line: Mapping[str, Any]) -> None:
        """See `Callback`."""
        self._tell("line", {name: part for name, part in line.items() if name not in _TEXTS})

    def end(self) -> None:
        """See `Callback`."""
        self._tell("end")

    def _tell(self, what: str, *arguments: Any) -> None:
        for name, callback in list(self._told.items()):
            try:
                getattr(callback, what)(*arguments)
            except Exception as error:
                # Whatever a service or a package from outside has come upon.
                del self._told[name]
                LOGGER.warning(
                    "run.callbacks: %r failed (%s) and is left out; the run goes on.", name, error
                )
