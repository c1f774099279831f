"""A site across machines: it does what messages ask on its own data, and replies.

One `Site` lives as long as its process, and holds one model however many rounds run. It keeps
nothing on disk but what was tuned at the end: a site that starts again is sent what it lacks.
"""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig, join, refusals
from fedforward.core.errors import FedForwardError, MessageError, out_of_memory
from fedforward.core.identity import ModelIdentity
from fedforward.core.paths import absolute_text, home
from fedforward.data.corpus import Corpus
from fedforward.data.sampler import Batches, Collate
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.client import Client, Replica
from fedforward.messages.envelope import Enrollment, Envelope, MessageKind, encode_json
from fedforward.messages.task import Task
from fedforward.methods.base import Method
from fedforward.methods.report_filters import ReportFilter, build_filters
from fedforward.models.base import CausalModel
from fedforward.models.loading import longest_sequence
from fedforward.training import build as experiment
from fedforward.training.assembly import build_method
from fedforward.training.run_directory import strict, write_json

LOGGER = logging.getLogger("fedforward.deployment.site")
#: Stands for a path in what leaves a site.
_OWN_PATH = "(a path of this site)"
_NEAR_NAME = re.compile(r" Did you mean '[^']*'\?")
#: Where a row is, and the name of a file of rows.
_FILE = r"\.(?:jsonl?|ndjson|[ct]sv|parquet|arrow|feather)(?:\.gz|\.zst)?\b"
_ROW = re.compile(rf"((?:line|row) \d+) of (?:.*?{_FILE}|\S+)")
_ROWS_FILE = re.compile(rf"[^\s'\"(]+{_FILE}")
#: A text in quotes, and what looks like a path without them.
_QUOTED = re.compile(r"(?<!\w)'[^'\n]*'")
_PATH = re.compile(r"(?<![\w/\\<])(?:~|\.{1,2})?(?:/|[A-Za-z]:[/\\])[^\s'\",;:)]*[^\s'\",;:).]")


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
    corpus: Corpus
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
        return sum(int(example.counted.sum()) for example in self.corpus.heldout)


def build(run: bytes, terms: dict[str, Any], settings: SiteConfig) -> Tuning:
    """Load model and data for a run.

    Raises:
        FedForwardError: for whatever is wrong with either, or with the terms.
    """
    config = join(terms, settings)
    reader = experiment.corpus_reader(config)
    plan = experiment.resolve_plan(config)
    with _of_the_data():
        classes = experiment.read_classes(config, reader)
    model, tokenizer = experiment.build_model(config, plan, classes)
    with _of_the_data():
        corpus = experiment.read_corpus(
            config, reader, tokenizer, longest_sequence(model.network), model.classes
        )
    method = build_method(config)
    model.plan = experiment.settle_plan(config, model, method)
    collate = experiment.collate_of(config, tokenizer, model)
    model.plan = experiment.fit_plan(config, model, corpus, method, collate)
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
        filters=(
            *build_filters(config.method.report_filters, "method.report_filters"),
            *build_filters(settings.site.filters, "site.filters"),
        ),
    )


@contextmanager
def _of_the_data() -> Iterator[None]:
    """Keeps what is wrong with the data here: the sentence may quote a row, a field or a file."""
    try:
        yield
    except FedForwardError as error:
        LOGGER.error("the data: %s", error)
        raise FedForwardError(
            "The data of this site cannot be used on these terms. The site's own log says why."
        ) from error


class Site:
    """Replies to messages; see the module.

    Attributes:
        loads: how often a model was loaded.
        tuning: what is built for the run in progress; None before the first HELLO.
    """

    def __init__(self, settings: SiteConfig) -> None:
        self.settings = settings
        self.loads = 0
        self.tuning: Tuning | None = None

    def answer(self, data: bytes) -> bytes:
        """The encoded reply to an encoded envelope; what goes wrong is a REFUSAL, a sentence."""
        run = b"\0" * 8
        try:
            envelope = Envelope.decode(data)
            run = envelope.run
            kind, body = self._answer(envelope)
        except FedForwardError as error:
            kind, body = MessageKind.REFUSAL, _encoded(str(error))
        except Exception as error:
            kind, body = MessageKind.REFUSAL, b"there is not enough memory here for what was asked"
            if not out_of_memory(error):
                # The server must hear of it, and the site's log has where it came from.
                LOGGER.exception("an error that was not foreseen")
                body = _encoded(f"{type(error).__name__}: {error}")
        if kind is MessageKind.REFUSAL:
            LOGGER.info("refused: %s", body.decode())
            body = self._without_paths(body.decode()).encode()
        answer = Envelope(kind, run, body).encode()
        if self.settings.site.keep_messages:
            self._keep_messages(data, answer, kind)
        return answer

    def _without_paths(self, text: str) -> str:
        """A refusal without paths and names of this site; its log has them."""
        own = self.settings
        sources = own.data.source
        places = [own.model.path, *([sources] if isinstance(sources, str) else sources)]
        more = (
            own.model.adapter,
            own.lora.init_file,
            own.method.mask_file,
            own.data.chat_template,
            own.data.chat,
            own.site.out,
        )
        places += [place for place in more if place]
        text = _ROW.sub(rf"\1 of {_OWN_PATH}", text)
        for place in places:
            for form in sorted({place, absolute_text(place)}, key=len, reverse=True):
                text = text.replace(repr(form), repr(_OWN_PATH))
                text = text.replace(form, _OWN_PATH) if len(form) > 3 else text
        text = _NEAR_NAME.sub("", text)
        quoted = repr(_OWN_PATH)
        text = _QUOTED.sub(
            lambda found: quoted if "/" in found[0] or "\\\\" in found[0] else found[0], text
        )
        return _ROWS_FILE.sub(_OWN_PATH, _PATH.sub(_OWN_PATH, text))

    def _keep_messages(self, data: bytes, answer: bytes, kind: MessageKind) -> None:
        """Write down what came in and what goes out, before it goes."""
        folder = home(self.settings.site.out) / "messages"
        folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max((int(path.name[:6]) for path in folder.glob("??????-*")), default=0)
        (folder / f"{number:06}-in").write_bytes(data)
        (folder / f"{number:06}-out-{kind.name.lower()}").write_bytes(answer)

    def _answer(self, envelope: Envelope) -> tuple[MessageKind, bytes]:
        if envelope.kind is MessageKind.HELLO:
            return MessageKind.ENROLLMENT, self.enroll(envelope).encode()
        if envelope.kind is MessageKind.REJECT:
            LOGGER.info("the server will not have this site: %s", envelope.text())
            return MessageKind.METRICS, b"{}"
        tuning = self.tuning
        if tuning is None or tuning.run != envelope.run:
            return MessageKind.UNKNOWN_RUN, b""
        if envelope.kind is MessageKind.SNAPSHOT_REQUEST:
            return MessageKind.SNAPSHOT, tuning.replica.snapshot().encode()
        answers = {
            MessageKind.TASK: self._report,
            MessageKind.EVALUATION: self._evaluate,
            MessageKind.FINALIZE: self._keep,
        }
        if envelope.kind not in answers:
            raise MessageError(f"A message of kind {envelope.kind.name} was refused by a site.")
        task = Task.decode(envelope.body)
        if _first_missing(task, tuning.replica.rounds) > tuning.replica.rounds:
            return MessageKind.OUT_OF_SYNC, encode_json({"rounds": tuning.replica.rounds})
        return answers[envelope.kind](tuning, task, envelope.body)

    def enroll(self, envelope: Envelope) -> Enrollment:
        """Build what a HELLO asks for, and say what this site has in common with others.

        Raises:
            FedForwardError: the terms are beyond this site's limits, or cannot be built.
        """
        terms = envelope.json().get("terms")
        if not isinstance(terms, dict):
            raise MessageError("A HELLO without terms was refused.")
        problems = refusals(terms, self.settings.limits)
        if problems:
            raise FedForwardError("; ".join(problems))
        tuning = self.tuning
        if tuning is None or (tuning.run, tuning.terms) != (envelope.run, terms):
            LOGGER.info("loading model and data")
            # The old model goes before the new one comes.
            self.tuning = tuning = None
            self.loads += 1
            tuning = self.tuning = build(envelope.run, terms, self.settings)
            LOGGER.info(
                "ready: %d training examples, %d tuned parameters",
                len(tuning.corpus.clients[0]),
                tuning.model.layout.parameters,
            )
        return Enrollment(
            name=self.settings.site.name,
            model=tuning.identity,
            examples=len(tuning.corpus.clients[0]),
            heldout=len(tuning.corpus.heldout),
            rounds=tuning.replica.rounds,
            active_blocks=self.settings.limits.active_blocks,
        )

    def _report(self, tuning: Tuning, task: Task, body: bytes) -> tuple[MessageKind, bytes]:
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
        LOGGER.info(
            "round %d: %d steps in %.1f s", task.round + 1, tuning.method.local_steps, seconds
        )
        return MessageKind.REPORT, report

    def _evaluate(self, tuning: Tuning, task: Task, body: bytes) -> tuple[MessageKind, bytes]:
        tuning.client(task.client).sync(task)
        measured = evaluation.measure(tuning.model, tuning.heldout)
        LOGGER.info("after round %d: held-out loss %.4f", task.round, measured["heldout_loss"])
        return MessageKind.METRICS, encode_json(strict({**self._progress(tuning), **measured}))

    def _keep(self, tuning: Tuning, task: Task, body: bytes) -> tuple[MessageKind, bytes]:
        tuning.client(task.client).sync(task)
        folder = home(self.settings.site.out)
        kept = folder / ("adapter" if tuning.config.model.tune == "lora" else "model")
        tuning.model.save(kept)
        progress = self._progress(tuning)
        write_json(folder / "state.json", {"run": tuning.run.hex(), **progress})
        LOGGER.info("the run is over after %d rounds: wrote %s", task.round, kept)
        return MessageKind.METRICS, encode_json(progress)

    def _progress(self, tuning: Tuning) -> dict[str, Any]:
        return {
            "rounds": tuning.replica.rounds,
            "digest": tuning.model.digest().hex(),
            "examples": len(tuning.corpus.heldout),
            "tokens": tuning.answer_tokens(),
        }


def _encoded(text: str) -> bytes:
    """UTF-8; bytes of file names that are no text become escapes."""
    return text.encode("utf-8", "backslashreplace")


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
