"""A site across machines: it does what messages ask on its own data, and replies.

One `Site` lives as long as its process, and holds one model however many rounds run. It keeps
nothing of a run but what was tuned at the end: a site that starts again is sent what it lacks.
What it was asked is kept (`asked`, `federation.releases`), so that it is not asked again for ever.
"""

import logging
import time
from typing import TYPE_CHECKING, Any

from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError, MessageError, out_of_memory
from fedforward.core.paths import home
from fedforward.deployment.asked import SeenTerms
from fedforward.deployment.limits import refusals
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.budget import SpentError
from fedforward.federation.rate_search import line_search_batches
from fedforward.federation.witness import Witness
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
from fedforward.training.model_card import write_card
from fedforward.training.run_directory import strict, write_json

if TYPE_CHECKING:
    pass
from fedforward.deployment.tuning import RefusedError, Tuning, build, refusing, seen_file

LOGGER = logging.getLogger("fedforward.deployment.site")
#: Messages of a kind that a run may have: so many a round, and some more.
RETRIES, SPARE = 2, 50
#: Bytes of a HELLO.
MAX_HELLO_BYTES = 1 << 18


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
        with refusing(RefusalCode.TERMS):
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
