"""A site across machines: it does what messages ask on its own data, and replies.

One `Site` lives as long as its process, and holds one model however many rounds run. It keeps
nothing of a run but what was tuned at the end: a site that starts again is sent what it lacks.
What it was asked is kept (`asked`, `federation.releases`), so that it is not asked again for ever.
"""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedforward.config.schema import Config, sections_of
from fedforward.config.site import SiteConfig, join
from fedforward.core.errors import FedForwardError, MessageError, out_of_memory
from fedforward.core.identity import ModelIdentity
from fedforward.core.paths import home
from fedforward.data.corpus import Corpus, CorpusReader
from fedforward.data.rows import fingerprints
from fedforward.data.sampler import Batches, Collate
from fedforward.data.templates import Template
from fedforward.deployment.asked import Asked, SeenTerms
from fedforward.deployment.limits import refusals, released, spending_folder
from fedforward.deployment.secure import sum_site
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.budget import Accounts, Budget, SpentError
from fedforward.federation.client import Client, Replica
from fedforward.federation.rate_search import line_search_batches
from fedforward.federation.releases import Releases
from fedforward.federation.witness import Seen, Witness, read_witness
from fedforward.messages.entry import takes_back
from fedforward.messages.envelope import (
    RUN_BYTES,
    Enrollment,
    Envelope,
    MessageKind,
    encode_json,
)
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.messages.task import Task
from fedforward.methods.base import Method
from fedforward.methods.privacy import Mechanism
from fedforward.methods.report_filters import ReportFilter, build_filters
from fedforward.models.base import CausalModel
from fedforward.models.loading import longest_sequence
from fedforward.training import build as experiment
from fedforward.training.assembly import build_method, filters_of, guarantee_of, mechanism_of
from fedforward.training.model_card import write_card
from fedforward.training.run_directory import strict, write_json

if TYPE_CHECKING:
    from fedforward.deployment.secure.site_side import SumSite

LOGGER = logging.getLogger("fedforward.deployment.site")
#: Messages of a kind that a run may have: so many a round, and some more.
RETRIES, SPARE = 2, 50
#: Bytes of a HELLO.
MAX_HELLO_BYTES = 1 << 18
#: Names of keys that a refusal may have; values of any of them stay here.
_KEYS = sorted(
    {
        f"{section}.{key}"
        for kind in (Config, SiteConfig)
        for section, part in sections_of(kind).items()
        for key in part.model_fields
    }
)
_NAMED = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, _KEYS))})(?![\w.]*\w)")


class RefusedError(FedForwardError):
    """What a site will not do: the sentence is for its own log, the refusal for the server."""

    def __init__(self, sentence: str, refusal: Refusal) -> None:
        super().__init__(sentence)
        self.refusal = refusal


@dataclass
class Tuning:
    """What a site has built for one run.

    Attributes:
        run: the run's random name.
        terms: as the server sent them.
        clients: the one that this site is, by the number that the server gave it.
        asked: how often each kind of message was answered that measures something.
        sums: masks reports, where the terms have secure sums.
        mechanism: clipping and noise, where the terms have privacy.
        releases: the rounds that were answered with noise, kept in a file.
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
    sums: "SumSite | None" = None
    mechanism: Mechanism | None = None
    releases: Releases | None = None
    clients: dict[int, Client] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)

    @property
    def model(self) -> CausalModel:
        """The model that the replica brings forward."""
        return self.replica.model

    def client(self, number: int) -> Client:
        """This site under the number that the server knows it by."""
        if number not in self.clients:
            if self.clients:
                raise MessageError(
                    f"A task of client {number} was refused: this site is "
                    f"{next(iter(self.clients))}."
                )
            method = self.config.method
            batches = Batches(
                self.corpus.clients[0],
                batch_size=method.batch_size,
                run_seed=self.config.run.seed,
                client=number,
                collate=self.collate,
            )
            self.clients[number] = Client(
                number,
                batches,
                self.replica,
                self.filters,
                sums=self.sums is not None,
                mechanism=self.mechanism,
                releases=self.releases,
            )
        return self.clients[number]

    def answer_tokens(self) -> int:
        """Held-out answer tokens, which a mean loss is weighted by."""
        return sum(int(example.counted.sum()) for example in self.corpus.heldout)


def build(run: bytes, terms: dict[str, Any], settings: SiteConfig) -> Tuning:
    """Load model and data for a run.

    Raises:
        RefusedError: for whatever is wrong with either, or with the terms.
    """
    with _refusing(RefusalCode.TERMS):
        config = join(terms, settings)
        reader = experiment.corpus_reader(config)
        plan = experiment.resolve_plan(config)
        _check_classes(config)
        mechanism = mechanism_of(config)
        asked = asked_of(run, settings)
    with _refusing(RefusalCode.LIMITS):
        _check_privacy(config, settings)
    with _refusing(RefusalCode.DATA):
        _check_conversation(config, reader, settings)
        _check_columns(config, reader, settings)
        releases = releases_of(run, config, settings, reader)
        classes = experiment.read_classes(config, reader)
    with _refusing(RefusalCode.MODEL):
        model, tokenizer = experiment.build_model(config, plan, classes)
    with _refusing(RefusalCode.DATA):
        corpus = experiment.read_corpus(
            config, reader, tokenizer, longest_sequence(model.network), model.classes
        )
    with _refusing(RefusalCode.TERMS):
        method = build_method(config)
        model.plan = experiment.settle_plan(config, model, method)
        collate = experiment.collate_of(config, tokenizer, model)
        model.plan = experiment.fit_plan(config, model, corpus, method, collate)
        if not method.capabilities.forward_only:
            raise FedForwardError(f"method.name = {config.method.name!r} would send tensors.")
        heldout = evaluation.prepare(config, corpus.heldout, tokenizer, model.plan, model.classes)
        own = build_filters(settings.site.filters, "site.filters")
        # What the terms bound is bounded last.
        whole = config.privacy.on and config.privacy.level == "client"
        filters = (*own, *filters_of(config)) if whole else (*filters_of(config), *own)
    with _refusing(RefusalCode.TERMS):
        replica = Replica(model, method)
        replica.known = seen_before(run, settings)
    return Tuning(
        run=run,
        terms=terms,
        config=config,
        corpus=corpus,
        collate=collate,
        heldout=heldout,
        replica=replica,
        method=method,
        identity=experiment.identity(model, tokenizer),
        filters=filters,
        sums=sum_site(run, config),
        mechanism=mechanism,
        releases=releases,
        asked=asked,
    )


@contextmanager
def _refusing(code: RefusalCode) -> Iterator[None]:
    """Makes what goes wrong a refusal with this code.

    Keys that the sentence names go with it, unless it is about the data: then even which key it is
    may depend on a row.
    """
    try:
        yield
    except RefusedError:
        raise
    except FedForwardError as error:
        keys = [] if code is RefusalCode.DATA else _NAMED.findall(str(error))
        raise RefusedError(str(error), Refusal.of(code, keys)) from error


def _check_classes(config: Config) -> None:
    """Refuse to make a classifier's classes of this site's data, which would then be sent."""
    data = config.data
    if config.model.head == "classification" and not (data.classes or data.label_words):
        raise FedForwardError(
            "model.head = 'classification' across machines needs data.classes or data.label_words, "
            "in the terms or in the site.toml of this site: the names of the classes are sent, and "
            "none is taken from a site's data."
        )


def _check_privacy(config: Config, settings: SiteConfig) -> None:
    """Refuse terms that would spend more of the examples' privacy than this site allows."""
    limits, found = settings.limits, guarantee_of(config)
    if limits.epsilon is None:
        return
    if found is None:
        raise FedForwardError(
            f"The terms have no privacy.clip, and this site has limits.epsilon = "
            f"{limits.epsilon:g}."
        )
    if config.privacy.level == "client":
        raise FedForwardError(
            "privacy.level = 'client' has noise that the server adds, and this site has "
            f"limits.epsilon = {limits.epsilon:g}, which is of noise that it adds itself."
        )
    if not config.privacy.withholds:
        raise FedForwardError(
            f"privacy.heldout = {config.privacy.heldout!r} sends figures of held-out rows without "
            f"noise, and this site has limits.epsilon = {limits.epsilon:g}."
        )
    if found.delta > limits.delta:
        raise FedForwardError(
            f"privacy.delta = {found.delta:g} is above this site's limits.delta = {limits.delta:g}."
        )
    spent = found.epsilon(config.federation.rounds)
    if spent > limits.epsilon:
        raise FedForwardError(
            f"{config.federation.rounds} rounds (federation.rounds) with this noise "
            f"(privacy.noise_multiplier) have epsilon {spent:.3f}, above this site's "
            f"limits.epsilon = {limits.epsilon:g}."
        )


def seen_file(settings: SiteConfig, run: bytes) -> Path:
    """Where a site keeps what it has seen of a run."""
    return home(settings.site.out) / "seen" / f"{run.hex()}.json"


def seen_before(run: bytes, settings: SiteConfig) -> dict[int, Seen]:
    """What this site has seen of a run before it was started.

    Raises:
        FedForwardError: the file that says so cannot be read.
    """
    path = seen_file(settings, run)
    return read_witness(path).seen if path.exists() else {}


def releases_of(
    run: bytes, config: Config, settings: SiteConfig, reader: CorpusReader
) -> Releases | None:
    """The rounds of a run that this site has answered with noise, before a restart as well.

    None without `[privacy]`.

    Raises:
        RefusedError: the run costs more than the rows of this site have left, or the files that
            say so cannot be read.
    """
    guarantee, limits = guarantee_of(config), settings.limits
    if guarantee is None or config.privacy.level == "client":
        return None
    most = None if limits.epsilon is None else (limits.epsilon, limits.delta)
    rows = fingerprints(reader.sources)
    folder = spending_folder(settings)
    with _refusing(RefusalCode.LIMITS):
        budget = Budget(Accounts(folder), run.hex(), rows, guarantee, most)
        budget.accounts.spent(rows)
        budget.check(config.federation.rounds)
        return Releases(folder / f"{run.hex()}.json", budget)


def asked_of(run: bytes, settings: SiteConfig) -> Asked:
    """How often this site was asked in a run, before a restart as well.

    Raises:
        FedForwardError: the file that says so cannot be read.
    """
    return Asked(home(settings.site.out) / "asked" / f"{run.hex()}.json")


def _check_conversation(config: Config, reader: CorpusReader, settings: SiteConfig) -> None:
    """Refuse conversations that were found in the data and that nobody named."""
    if reader.chat is not None and config.data.chat is None:
        raise FedForwardError(
            f"The data hold conversations in {reader.chat!r}, which the terms do not name. Set "
            "data.chat in the site.toml of this site to release them."
        )


def _check_columns(config: Config, reader: CorpusReader, settings: SiteConfig) -> None:
    """Refuse a path that is a column of its own: its name begins like that of a released one."""
    if reader.chat is not None:
        return
    named = {
        path
        for key in ("prompt", "answer")
        for path in Template.parse(getattr(config.data, key), f"data.{key}").paths
    }
    columns = {name for source in reader.sources for name in source.columns()}
    if closed := sorted(named & columns - released(settings)):
        raise FedForwardError(
            f"The terms name {closed[0]!r}, which is a field of the data that this site has not "
            "released. Name it with limits.fields in site.toml if it may be used."
        )


class Site:
    """Replies to messages; see the module.

    Attributes:
        loads: how often a model was loaded.
        tuning: what is built for the run in progress; None before the first HELLO.
    """

    def __init__(self, settings: SiteConfig) -> None:
        self.settings = settings
        self.loads = 0
        self._kept = 0
        self._terms: SeenTerms | None = None
        self.tuning: Tuning | None = None

    def answer(self, data: bytes) -> bytes:
        """The encoded reply to an encoded envelope; what goes wrong is a REFUSAL, a `Refusal`."""
        run = b"\0" * RUN_BYTES
        try:
            envelope = Envelope.decode(data)
            run = envelope.run
            kind, body = self._answer(envelope)
        except Exception as error:
            kind, body = MessageKind.REFUSAL, _refusal(error).encode()
        answer = Envelope(kind, run, body).encode()
        if not self.settings.site.keep_messages:
            return answer
        try:
            self._keep_messages(data, answer, kind)
        except OSError as error:
            # What cannot be kept does not leave.
            return Envelope(MessageKind.REFUSAL, run, _refusal(error).encode()).encode()
        return answer

    def _keep_messages(self, data: bytes, answer: bytes, kind: MessageKind) -> None:
        """Write down what came in and what goes out, before it goes."""
        folder = home(self.settings.site.out) / "messages"
        folder.mkdir(parents=True, exist_ok=True)
        if not self._kept:
            names = (path.name.partition("-")[0] for path in folder.glob("*-in"))
            self._kept = max((int(name) for name in names if name.isdecimal()), default=0)
        self._kept += 1
        number = self._kept
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
        if tuning.sums is not None and envelope.kind in tuning.sums.kinds:
            return tuning.sums.answer(tuning, envelope, self._task)
        if tuning.sums is not None and envelope.kind is MessageKind.TASK:
            raise MessageError("A task was refused: these terms have secure sums, and it has none.")
        return self._task(tuning, envelope.kind, envelope.body)

    def _task(self, tuning: Tuning, kind: MessageKind, body: bytes) -> tuple[MessageKind, bytes]:
        answers = {
            MessageKind.TASK: self._report,
            MessageKind.EVALUATION: self._evaluate,
            MessageKind.FINALIZE: self._keep,
        }
        if kind not in answers:
            raise MessageError(f"A message of kind {kind.name} was refused by a site.")
        task = Task.decode(body)
        _check_bounds(task, kind, tuning)
        if _first_missing(task, tuning.replica.rounds) > tuning.replica.rounds:
            return MessageKind.OUT_OF_SYNC, encode_json({"rounds": tuning.replica.rounds})
        answer = answers[kind](tuning, task, body)
        self._note_seen(tuning)
        return answer

    def _note_seen(self, tuning: Tuning) -> None:
        """Keep what this site was sent of the ledger, for the time after a restart and for others.

        A write that a power failure undoes is of no harm: less was seen then.
        """
        seen, known = tuning.replica.seen, tuning.replica.known
        before = known.get(seen.begin)
        if not seen.rounds or (before is not None and before.rounds >= seen.rounds):
            return
        known[seen.begin] = seen
        path = seen_file(self.settings, tuning.run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, Witness(tuning.run.hex(), known).to_json())

    def enroll(self, envelope: Envelope) -> Enrollment:
        """Build what a HELLO asks for, and say what this site has in common with others.

        Raises:
            RefusedError: the terms are beyond this site's limits, or cannot be built.
        """
        if len(envelope.body) > MAX_HELLO_BYTES:
            raise MessageError(
                f"A HELLO of {len(envelope.body)} bytes was refused; {MAX_HELLO_BYTES} are allowed."
            )
        terms = envelope.json().get("terms")
        if not isinstance(terms, dict):
            raise MessageError("A HELLO without terms was refused.")
        problems = refusals(terms, self.settings)
        if problems:
            keys, sentences = zip(*problems, strict=True)
            raise RefusedError("; ".join(sentences), Refusal.of(RefusalCode.LIMITS, keys))
        tuning = self.tuning
        if tuning is None or (tuning.run, tuning.terms) != (envelope.run, terms):
            self._check_terms(envelope.run, terms)
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
            if not self._told(tuning):
                LOGGER.info(
                    "no held-out figures are told: %d examples are held out (data.heldout), and "
                    "limits.heldout = %d",
                    len(tuning.corpus.heldout),
                    self.settings.limits.heldout,
                )
        # With privacy how many there are is not told.
        private = tuning.config.privacy
        true = len(tuning.corpus.clients[0])
        return Enrollment(
            name=self.settings.site.name,
            model=tuning.identity,
            examples=(private.examples or 1) if private.on else true,
            heldout=self._told(tuning),
            rounds=tuning.replica.rounds,
            active_blocks=self.settings.limits.active_blocks,
        )

    def _check_terms(self, run: bytes, terms: dict[str, Any]) -> None:
        """Refuse one run, or change of terms, too many."""
        most, path = self.settings.limits.terms, home(self.settings.site.out) / "asked/terms.json"
        with _refusing(RefusalCode.TERMS):
            if self._terms is None:
                self._terms = SeenTerms(path)
            if self._terms.note(run, terms, most):
                return
        raise RefusedError(
            f"This is the {most + 1}th run or change of terms, and limits.terms = {most}. Raise it "
            f"in site.toml if that is as it should be. {path} has all that there were.",
            Refusal(RefusalCode.LIMITS, ("limits.terms",)),
        )

    def _report(self, tuning: Tuning, task: Task, body: bytes) -> tuple[MessageKind, bytes]:
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
        sent = measured if self._told(tuning) else {}
        return MessageKind.METRICS, encode_json(strict({**self._progress(tuning), **sent}))

    def _keep(self, tuning: Tuning, task: Task, body: bytes) -> tuple[MessageKind, bytes]:
        tuning.client(task.client).sync(task)
        folder = home(self.settings.site.out)
        kept = folder / ("adapter" if tuning.config.model.tune == "lora" else "model")
        tuning.model.save(kept)
        progress = self._progress(tuning)
        write_card(kept, tuning.config, rounds=progress["rounds"], state_digest=progress["digest"])
        write_json(folder / "state.json", {"run": tuning.run.hex(), **progress})
        LOGGER.info("the run is over after %d rounds: wrote %s", task.round, kept)
        return MessageKind.METRICS, encode_json(progress)

    def _told(self, tuning: Tuning) -> int:
        """Held-out examples that figures are told of; 0 where they are withheld or too few."""
        count = len(tuning.corpus.heldout)
        withheld = tuning.config.privacy.withholds or count < self.settings.limits.heldout
        return 0 if withheld else count

    def _progress(self, tuning: Tuning) -> dict[str, Any]:
        told = self._told(tuning)
        return {
            "rounds": tuning.replica.rounds,
            "digest": tuning.model.digest().hex(),
            "examples": told,
            "tokens": tuning.answer_tokens() if told else 0,
        }


def _refusal(error: Exception) -> Refusal:
    """What the server is told of an error; this site's log has the whole of it."""
    if isinstance(error, RefusedError):
        LOGGER.error("refused: %s", error)
        return error.refusal
    if out_of_memory(error):
        LOGGER.error("refused: there is not enough memory here for what was asked")
        return Refusal(RefusalCode.MEMORY)
    if isinstance(error, SpentError):
        LOGGER.error("refused: %s", error)
        return Refusal(RefusalCode.LIMITS, ("limits.epsilon",))
    if isinstance(error, FedForwardError):
        LOGGER.error("refused: %s", error)
        return Refusal(RefusalCode.MESSAGE)
    LOGGER.error("an error that was not foreseen", exc_info=error)
    return Refusal(RefusalCode.UNFORESEEN)


def _check_bounds(task: Task, kind: MessageKind, tuning: Tuning) -> None:
    """Refuse what measures more than the terms have.

    Every loss at weights of the server's choice answers a question about the data.

    Raises:
        MessageError: it is a later round than the terms have, one question too many, or a line
            search that a server does not need.
    """
    config = tuning.config
    agreed, method = config.federation.rounds, config.method
    # After the last round there may be one that takes others back.
    last = agreed - 1 if kind is MessageKind.TASK else agreed + 1
    if task.round > last:
        raise MessageError(f"Round {task.round + 1} was refused: the terms have {agreed}.")
    probes = method.local_steps * method.probes_per_step
    most = line_search_batches(probes) if method.learning_rate == "auto" else 0
    if task.line_search > most:
        raise MessageError(
            f"A line search on {task.line_search} batches was refused: the terms make it {most}."
        )
    allowed = RETRIES * agreed + SPARE
    if (count := tuning.asked.note(kind, allowed)) > allowed:
        raise MessageError(
            f"The {count}th {kind.name} was refused: the terms have {agreed} rounds, and this site "
            f"answers {allowed}."
        )


def _first_missing(task: Task, rounds: int) -> int:
    """The first ledger round that a site must hold to do a task; no more than `rounds` if it can.

    A site that is ahead of the server holds another run's rounds: it can do nothing with the task,
    unless it is told to begin again.
    """
    if task.reset or task.snapshot:
        return 0
    if rounds > task.round or (takes_back(task.entries, rounds) and task.entries[0].round):
        return rounds + 1
    return task.entries[0].round if task.entries else task.round
