"""What the commands share to speak with people: consoles, logging, progress, errors as sentences.

Results go to standard output, everything else to standard error, so that `--json` leaves nothing
but JSON on the former. The library itself logs under the package's name and prints nothing; the
handler that shows its records is set up here and nowhere else.
"""

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedforward.cli.tables import heldout_values
from fedforward.core.errors import FedForwardError, out_of_memory
from fedforward.core.logs import PHASES, PROGRESS

#: Results, for people or as JSON.
out_console = Console()
#: Progress, log records and errors.
console = Console(stderr=True)

#: Exit codes for what a user can mend, and for what may pass by itself (sysexits' EX_TEMPFAIL).
MISTAKE, TEMPORARY = 2, 75
_OF_THE_MACHINE = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO}
)

log = logging.getLogger(__name__)
_package = logging.getLogger("fedforward")
#: What sites and processes do is the progress display of a run across machines.
deployment_log = logging.getLogger("fedforward.deployment")


class _ConsoleHandler(logging.Handler):
    """Shows records on the standard error console, above a live progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record: INFO as it is, the others with their level."""
        text = Text(record.getMessage())
        if record.levelno <= logging.DEBUG:
            text = Text(f"{record.name}: ").append(text)
            text.stylize("dim")
        elif record.levelno != logging.INFO:
            style = "bold red" if record.levelno >= logging.ERROR else "yellow"
            text = Text.assemble((f"{record.levelname.lower()}:", style), " ", text)
        console.print(text, soft_wrap=True)
        if record.exc_info and _package.isEnabledFor(logging.DEBUG):
            trace = logging.Formatter().formatException(record.exc_info)
            console.print(Text(trace), soft_wrap=True)


_handler = _ConsoleHandler()


def set_up_logging(*, verbose: bool, quiet: bool) -> None:
    """Choose what standard error shows.

    Args:
        verbose: log records of every level.
        quiet: errors alone, and no progress.

    Raises:
        FedForwardError: both were asked for.
    """
    if verbose and quiet:
        raise FedForwardError("-v and -q exclude each other. Leave one out.")
    if _handler not in _package.handlers:
        _package.addHandler(_handler)
    level, of_deployment = logging.WARNING, logging.INFO
    if verbose or quiet:
        level = of_deployment = logging.DEBUG if verbose else logging.ERROR
    _package.setLevel(level)
    deployment_log.setLevel(of_deployment)


def _shows_progress() -> bool:
    return _package.getEffectiveLevel() < logging.ERROR


@contextmanager
def friendly(resume_hint: str = "") -> Iterator[None]:
    """Show sentences instead of tracebacks for what a user can cause; `-v` shows both.

    Args:
        resume_hint: how to go on after an interruption.

    Raises:
        typer.Exit: with code 2 for an error, `TEMPORARY` for a machine that has no room or no
            files left, and 130 for Ctrl-C.
    """
    try:
        yield
    except FedForwardError as error:
        raise _refusal(str(error), error) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        words = f"{where}{error.strerror or error}. Look at the path, its rights and its room."
        code = TEMPORARY if error.errno in _OF_THE_MACHINE else MISTAKE
        raise _refusal(words, error, code) from error
    except UnicodeError as error:
        raise _refusal(
            f"a name or a text cannot be written in the system's encoding: {error}. Set "
            "PYTHONUTF8=1, or LC_ALL=C.UTF-8.",
            error,
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise _refusal(
            "there is not enough memory. Lower method.batch_size, data.sequence_length or "
            f"run.probes_per_call, or take a smaller model. {resume_hint}",
            error,
        ) from error
    except KeyboardInterrupt:
        say(console, f"interrupted. {resume_hint}")
        raise typer.Exit(130) from None


def _refusal(message: str, error: Exception, code: int = MISTAKE) -> typer.Exit:
    log.debug("the error below was raised here", exc_info=error)
    console.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    return typer.Exit(code)


def say(where: Console, text: str) -> None:
    """Print as it is: paths may hold what rich takes for markup, and must not be wrapped."""
    where.print(Text(text), soft_wrap=True)


class Display:
    """The progress of a command: a bar on a terminal, plain lines elsewhere, nothing with `-q`.

    Attributes:
        objective: of the run whose rounds are shown.
        title: what phases and rounds are of, where there are several runs.
    """

    def __init__(self, progress: Progress) -> None:
        self.rich = progress
        self.objective = "loss"
        self.title = ""
        self._part: TaskID | None = None
        self.task = progress.add_task("starting", total=None)
        self.heldout = ""
        self._plain = _shows_progress() and not console.is_terminal
        self._phase = ""
        self._began = time.monotonic()

    def phase(self, text: str) -> None:
        """Show that a step begins whose length is not known."""
        self.end_phase()
        text = f"{self.title}{text}"
        self._phase = text
        self.rich.update(self.task, description=text)
        if self._plain:
            console.print(Text(text))

    def count(self, done: int, total: int) -> None:
        """Show how far the step is that began last."""
        self.rich.update(self.task, total=total, completed=done)

    def part(self, text: str, done: int, total: int) -> None:
        """Show how far a part of a step is, as a bar of its own that is gone when it is done."""
        if self._part is None:
            self._part = self.rich.add_task(text, total=total)
        self.rich.update(self._part, description=text, total=total, completed=done)
        if done >= total:
            self.rich.remove_task(self._part)
            self._part = None

    def progress(self, done: int, total: int, line: dict[str, Any]) -> None:
        """Show a round that is done; `line` is its metrics line."""
        self.end_phase()
        if "heldout_loss" in line:
            values = heldout_values(self.objective, line["heldout_loss"], line.get("metrics", {}))
            self.heldout = "  held-out " + "  ".join(f"{n} {v}".strip() for n, v in values.items())
        training = line["training_loss"]
        losses = f"training {training:.3f}" if training is not None else "training not known"
        if "epsilon" in line:
            losses = f"epsilon {line['epsilon']:.3f}"
            losses += f" at delta {line['delta']:g}" if line["delta"] else ""
        text = f"{self.title}round {done}/{total}  {losses}{self.heldout}"
        self.rich.update(self.task, description=text, total=total, completed=done)
        if self._plain and ("heldout_loss" in line or done == total):
            console.print(f"{text}  {line['seconds']:.0f} s", highlight=False)
        log.debug("round %d: %s", done, line)

    def end_phase(self) -> None:
        """Log how long the step took that began last."""
        if self._phase:
            log.debug("%s: %.2f s", self._phase, time.monotonic() - self._began)
        self._phase = ""
        self._began = time.monotonic()


class _PhaseHandler(logging.Handler):
    """Hands what a run does just now to the display."""

    def __init__(self, target: Display) -> None:
        super().__init__(PROGRESS)
        self.target = target

    def emit(self, record: logging.LogRecord) -> None:
        """Show a phase, or how far one is that says so."""
        total = getattr(record, "total", None)
        if total is not None and not self.target.rich.disable:
            what = record.getMessage().partition(":")[0]
            self.target.part(what, getattr(record, "done", 0), total)
        elif record.levelno >= logging.INFO:
            self.target.phase(record.getMessage())


@contextmanager
def _phases_shown(target: Display) -> Iterator[None]:
    """Phases are the display's while the block runs, and no log lines."""
    handler, level = _PhaseHandler(target), PHASES.level
    PHASES.addHandler(handler)
    PHASES.setLevel(PROGRESS)
    PHASES.propagate = False
    try:
        yield
    finally:
        PHASES.removeHandler(handler)
        PHASES.setLevel(level)
        PHASES.propagate = True


@contextmanager
def display(first: str = "") -> Iterator[Display]:
    """A `Display` that is gone from the terminal at the end.

    Args:
        first: the step that it begins with.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    live = console.is_terminal and _shows_progress()
    with Progress(*columns, console=console, transient=True, disable=not live) as progress:
        result = Display(progress)
        if first:
            result.phase(first)
        with _phases_shown(result):
            yield result
        result.end_phase()
