"""Whether each entry of a ledger is what its own reports add up to: rounds are made again.

A report, the chain over it and the summary may be altered together, and all hashes then agree.
The entry that the report leads to does not. It needs no model, and imports no PyTorch.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from fedforward.core.errors import FedForwardError, MessageError
from fedforward.federation.ledger import Round
from fedforward.federation.round_maker import RoundMaker, RoundSettings, weights_of
from fedforward.federation.secure_sums import check_total, is_bare
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult
from fedforward.methods.base import Method

#: Rates that are chosen without looking at who else was asked in a round.
_OF_ONE_CLIENT = ("fixed", "random")
#: How far learning rates and weights may differ: libraries round logarithms and powers otherwise.
_RELATIVE = 1e-9
#: How far the coefficients of joined clients may, relative to their own size and to the largest:
#: processors add products in other orders, which may move the last bit of a float32.
_LAST_BIT, _OF_LARGEST = 2.0**-23, 1e-12


class Audit:
    """Makes the rounds of a ledger again, one after another.

    Attributes:
        difference: a sentence on the first round that does not agree; empty if all do.
        unchecked: what the ledger does not have enough for, in words.
    """

    def __init__(
        self,
        settings: RoundSettings,
        method: Method,
        remaining: Callable[[int], Iterable[Round]],
        *,
        examples_told: bool = False,
    ) -> None:
        """Begin before the first round.

        Args:
            remaining: those of the first n rounds that none of them takes back.
            examples_told: whether reports have the numbers of examples that weights were made of.
                Sites across machines tell them when they enrol, and may tell others later.
        """
        self.settings = settings
        self.method = method
        self.difference = ""
        self._maker = RoundMaker(settings, method)
        self._remaining_rounds = remaining
        self._entries = type(method).kept is Method.kept
        self._rates = settings.rates.client_rates in _OF_ONE_CLIENT
        self._weights = settings.weights == "equal" or examples_told
        self.unchecked = tuple(
            words
            for checked, words in (
                (self._entries, "entries, whose reports are not kept whole"),
                (self._rates, "learning rates, which depend on who was asked"),
                (self._weights, "weights, which sites' numbers of examples made"),
            )
            if not checked
        )

    def take(self, record: Round) -> None:
        """Look at the next round; once one does not agree, no later one is looked at."""
        if self.difference:
            return
        try:
            # Absurd numbers are to end in a sentence, not in warnings on the way.
            with np.errstate(all="ignore"):
                if record.entry.goes_back:
                    words = self._went_back(record)
                else:
                    words = self._compared(record)
                    self._maker.observe(record)
                    self._maker.remember(record)
        except (FedForwardError, ArithmeticError, ValueError) as error:
            words = f"its reports cannot be joined ({str(error).rstrip('.')})"
        if words:
            self.difference = f"round {record.entry.round}: {words}"

    def _went_back(self, record: Round) -> str:
        """What is wrong with a round that takes others back, in words; empty if nothing is."""
        entry = record.entry
        if record.results or record.total is not None:
            return "it takes rounds back, and has reports"
        if entry.keeps <= self._maker.last_return:
            return f"it takes back round {self._maker.last_return}, which took others back"
        self._maker.go_back(record, self._remaining_rounds(entry.round))
        return ""

    def _compared(self, record: Round) -> str:
        """What of a round does not agree with its reports, in words; empty if all does."""
        results = record.results
        self._check_form(record)
        clients = [part.report.client for part in results]
        if self._weights:
            examples = [part.report.examples for part in results]
            wanted = weights_of(self.settings, examples)
            found = [part.weight for part in results]
            if words := _differing("weight", clients, found, wanted):
                return words
        if self._rates and (words := self._rates_differ(results)):
            return words
        made = self._maker.entry(results, record.total) if self._entries else record.entry
        if not _same(made, record.entry, self.method):
            return "its entry is not what its reports add up to; one of them was changed"
        return ""

    def _check_form(self, record: Round) -> None:
        """Refuse results that no server would have closed a round with."""
        clients = [part.report.client for part in record.results]
        if not clients or clients != sorted(set(clients)):
            raise MessageError("they are of no clients, or of one twice")
        layout = self.settings.layout
        for part in record.results:
            if part.report.round != record.entry.round:
                raise MessageError(f"one is of round {part.report.round}")
            if part.blocks is not None and len(part.blocks) != len(layout.blocks):
                raise MessageError(f"one is of {len(part.blocks)} blocks")
            if len(part.report.line_search) not in (0, 4):
                raise MessageError("one was measured at other points than three")
            if self._entries and not self.settings.secure_sums:
                self.method.check_report(part.report, layout.parameters)
            elif self.settings.secure_sums and not is_bare(part.report):
                raise MessageError(
                    f"that of client {part.report.client} has numbers beside the sum"
                )
        if self.settings.secure_sums:
            self._check_total(record)

    def _check_total(self, record: Round) -> None:
        total, steps = record.total, self.method.local_steps
        if total is None or total.clients != len(record.results):
            raise MessageError("the sum is not that of the clients that are named")
        check_total(total, steps, steps * self.method.directions)

    def _rates_differ(self, results: tuple[ClientResult, ...]) -> str:
        reports = [part.report for part in results]
        clients = [report.client for report in reports]
        multipliers = self._maker.multipliers(clients)
        words = ""
        # A run may have gone on after what was to be its last round.
        for last in (False, True):
            made = self._maker.results(
                reports, [part.weight for part in results], multipliers, {}, last=last
            )
            wanted = [part.learning_rate for part in made]
            found = [part.learning_rate for part in results]
            words = _differing("learning rate", clients, found, wanted)
            if not words or self._maker.search is None:
                break
        return words


def _differing(what: str, clients: list[int], found: list[float], wanted: list[float]) -> str:
    for client, there, here in zip(clients, found, wanted, strict=True):
        if not math.isclose(there, here, rel_tol=_RELATIVE):
            return f"the {what} of client {client} is {there:.9g}, made again it is {here:.9g}"
    return ""


def _same(made: Entry, found: Entry, method: Method) -> bool:
    """Whether two entries are the same, bit for bit where no sum over clients was rounded."""
    if made.encode() == found.encode():
        return True
    if not method.capabilities.shared_directions:
        return False
    made = Entry.decode(made.encode())
    if len(made.contributions) != len(found.contributions):
        return False
    parts = zip(made.contributions, found.contributions, strict=True)
    alike = (made.decay, made.payload) == (found.decay, found.payload)
    return alike and all(_alike(mine, theirs) for mine, theirs in parts)


def _alike(made: Contribution, found: Contribution) -> bool:
    heads = [
        (part.client, part.age, len(part.coefficients), _bits(part.blocks))
        for part in (made, found)
    ]
    if heads[0] != heads[1]:
        return False
    mine, theirs = (part.coefficients.astype(np.float64) for part in (made, found))
    size = np.abs(theirs)
    allowed = _LAST_BIT * size + _OF_LARGEST * size.max(initial=0.0)
    return bool((np.abs(mine - theirs) <= allowed).all())


def _bits(blocks: NDArray[np.bool_] | None) -> bytes:
    return b"" if blocks is None else blocks.tobytes()
