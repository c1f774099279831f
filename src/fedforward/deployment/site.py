"""A site across machines: it opens letters, does what they ask on its own data, and answers.

One `Site` lives as long as its process, and holds one model however many rounds run. It keeps
nothing on disk but what was tuned at the end: a site that starts again is sent what it lacks.
"""

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig, join, refusals
from fedforward.core.errors import FedForwardError, MessageError, out_of_memory
from fedforward.core.identity import ModelIdentity
from fedforward.data.sampler import Batches, Collate
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.client import Client, Replica
from fedforward.messages.envelope import Enrolment, Kind, Letter, packed
from fedforward.messages.task import Task
from fedforward.methods.base import Method
from fedforward.methods.report_filters import ReportFilter
from fedforward.models.base import CausalModel
from fedforward.models.loading import longest_sequence
from fedforward.training import build as experiment
from fedforward.training.assembly import build_method
from fedforward.training.run_directory import strict, write_json


@dataclass
class Tuning:
    """What a site has built for one run.

    Attributes:
        run: the run's random name.
        terms: as the server sent them.
        clients: by number; a site has one, unless the server was set up anew.
    """

    run: bytes
    terms: dict[str, Any]
    config: Config
    corpus: experiment.Corpus
    collate: Collate
    heldout: evaluation.HeldOut
    replica: Replica
    method: Method
    identity: ModelIdentity
    filters: tuple[ReportFilter, ...] = ()
    clients: dict[int, Client] = field(default_factory=dict)

    @property
    def model(self) -> CausalModel:
        """The model that the replica brings forward."""
        return self.replica.model

    def client(self, number: int) -> Client:
        """This site under the number that the server knows it by."""
        if number not in self.clients:
            method = self.config.method
            batches = Batches(
                self.corpus.clients[0],
                batch_size=method.batch_size,
                run_seed=self.config.run.seed,
                client=number,
                collate=self.collate,
            )
            self.clients[number] = Client(number, batches, self.replica, self.filters)
        return self.clients[number]

    def answer_tokens(self) -> int:
        """Held-out answer tokens, which a mean loss is weighted by."""
        return sum(len(e.tokens) - e.prompt_length for e in self.corpus.heldout)


def build(run: bytes, terms: dict[str, Any], settings: SiteConfig) -> Tuning:
    """Load model and data for a run.

    Raises:
        FedForwardError: for whatever is wrong with either, or with the terms.
    """
    config = join(terms, settings)
    model, tokenizer = experiment.build_model(config, experiment.resolve_plan(config))
    corpus = experiment.read_corpus(
        config, tokenizer, longest_sequence(model.network), model.classes
    )
    collate = experiment.collate_of(config, tokenizer, model.classes)
    if config.run.memory_budget:
        model.plan = experiment.fit_plan(config, model, corpus, build_method(config), collate)
    method = build_method(config)
    if not method.capabilities.forward_only:
        raise FedForwardError(f"method.name = {config.method.name!r} would send tensors.")
    return Tuning(
        run=run,
        terms=terms,
        config=config,
        corpus=corpus,
        collate=collate,
        heldout=evaluation.prepare(config, corpus.heldout, tokenizer, model.plan, model.classes),
        replica=Replica(model, method),
        method=method,
        identity=experiment.identity(model, tokenizer),
    )


class Site:
    """Answers letters; see the module.

    Attributes:
        loads: how often a model was loaded.
        tuning: what is built for the run in progress; None before the first greeting.
    """

    def __init__(self, settings: SiteConfig, notice: Callable[[str], None]) -> None:
        """`notice` is told, in words, what the site does."""
        self.settings = settings
        self.notice = notice
        self.loads = 0
        self.tuning: Tuning | None = None

    def answer(self, data: bytes) -> bytes:
        """The sealed answer to a sealed letter; whatever goes wrong is a REFUSAL, a sentence."""
        run = b"\0" * 8
        try:
            letter = Letter.open(data)
            run = letter.run
            kind, body = self._answer(letter)
        except FedForwardError as error:
            kind, body = Kind.REFUSAL, str(error).encode()
        except Exception as error:
            kind, body = Kind.REFUSAL, b"there is not enough memory here for what was asked"
            if not out_of_memory(error):
                # The server must hear of it, and the site's log has where it came from.
                traceback.print_exc(file=sys.stderr)
                body = f"{type(error).__name__}: {error}".encode()
        if kind is Kind.REFUSAL:
            self.notice(f"refused: {body.decode()}")
        answer = Letter(kind, run, body).seal()
        if self.settings.site.keep_messages:
            self._keep_letters(data, answer, kind)
        return answer

    def _keep_letters(self, data: bytes, answer: bytes, kind: Kind) -> None:
        """Write down what came in and what goes out, before it goes."""
        folder = Path(self.settings.site.out) / "letters"
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name[:6]) for path in folder.glob("??????-*")), default=0)
        (folder / f"{number:06}-in").write_bytes(data)
        (folder / f"{number:06}-out-{kind.name.lower()}").write_bytes(answer)

    def _answer(self, letter: Letter) -> tuple[Kind, bytes]:
        if letter.kind is Kind.GREETING:
            return Kind.ENROLMENT, self._enrol(letter).encode()
        if letter.kind is Kind.DISMISSAL:
            self.notice(f"the server will not have this site: {letter.text()}")
            return Kind.FIGURES, b"{}"
        tuning = self.tuning
        if tuning is None or tuning.run != letter.run:
            return Kind.STRANGER, b""
        if letter.kind is Kind.SNAPSHOT_WANTED:
            return Kind.SNAPSHOT, tuning.replica.snapshot().encode()
        answers = {
            Kind.TASK: self._report,
            Kind.EVALUATION: self._evaluate,
            Kind.FAREWELL: self._keep,
        }
        if letter.kind not in answers:
            raise MessageError(f"A letter of kind {letter.kind.name} was refused by a site.")
        task = Task.decode(letter.body)
        if _first_missing(task, tuning.replica.rounds) > tuning.replica.rounds:
            return Kind.BEHIND, packed({"rounds": tuning.replica.rounds})
        return answers[letter.kind](tuning, task, letter.body)

    def _enrol(self, letter: Letter) -> Enrolment:
        terms = letter.json().get("terms")
        if not isinstance(terms, dict):
            raise MessageError("A greeting without terms was refused.")
        problems = refusals(terms, self.settings.limits)
        if problems:
            raise FedForwardError("; ".join(problems))
        tuning = self.tuning
        if tuning is None or (tuning.run, tuning.terms) != (letter.run, terms):
            self.notice("loading model and data")
            # The old model goes before the new one comes.
            self.tuning = tuning = None
            self.loads += 1
            tuning = self.tuning = build(letter.run, terms, self.settings)
            self.notice(
                f"ready: {len(tuning.corpus.clients[0])} training examples, "
                f"{tuning.model.layout.parameters} tuned parameters"
            )
        return Enrolment(
            name=self.settings.site.name,
            model=tuning.identity,
            examples=len(tuning.corpus.clients[0]),
            heldout=len(tuning.corpus.heldout),
            rounds=tuning.replica.rounds,
            active_blocks=self.settings.limits.active_blocks,
        )

    def _report(self, tuning: Tuning, task: Task, body: bytes) -> tuple[Kind, bytes]:
        agreed = tuning.config.federation.rounds
        if task.round >= agreed:
            raise MessageError(f"Round {task.round + 1} was refused: the terms have {agreed}.")
        began = time.monotonic()
        steps = tuning.client(task.client).answer(body)
        try:
            probes = next(steps)
            while True:
                probes = steps.send(tuning.model.evaluate(probes))
        except StopIteration as done:
            report: bytes = done.value
        seconds = time.monotonic() - began
        self.notice(f"round {task.round + 1}: {tuning.method.local_steps} steps in {seconds:.1f} s")
        return Kind.REPORT, report

    def _evaluate(self, tuning: Tuning, task: Task, body: bytes) -> tuple[Kind, bytes]:
        tuning.client(task.client).sync(task)
        figures = evaluation.measure(tuning.model, tuning.heldout, self.notice)
        self.notice(f"after round {task.round}: held-out loss {figures['heldout_loss']:.4f}")
        return Kind.FIGURES, packed(strict({**self._place(tuning), **figures}))

    def _keep(self, tuning: Tuning, task: Task, body: bytes) -> tuple[Kind, bytes]:
        tuning.client(task.client).sync(task)
        folder = Path(self.settings.site.out)
        kept = folder / ("adapter" if tuning.config.model.tune == "lora" else "model")
        tuning.model.save(kept)
        place = self._place(tuning)
        write_json(folder / "state.json", {"run": tuning.run.hex(), **place})
        self.notice(f"the run is over after {task.round} rounds: wrote {kept}")
        return Kind.FIGURES, packed(place)

    def _place(self, tuning: Tuning) -> dict[str, Any]:
        return {
            "rounds": tuning.replica.rounds,
            "digest": tuning.model.digest().hex(),
            "examples": len(tuning.corpus.heldout),
            "tokens": tuning.answer_tokens(),
        }


def _first_missing(task: Task, rounds: int) -> int:
    """The first ledger round that a site must hold to do a task; no more than `rounds` if it can.

    A site that is ahead of the server holds another run's rounds: it can do nothing with the task,
    unless it is told to begin again.
    """
    if task.reset or task.snapshot:
        return 0
    if rounds > task.round:
        return rounds + 1
    return task.entries[0].round if task.entries else task.round
