"""What secure sums cost: bytes and seconds of a round beside none.

    python benchmarks/secure_sums.py [--sites 3 10 100] [--gone 0.1] [--json]

All parts of the protocol are the real ones, in one process and without models or a network: keys,
shares, masked reports and the opening of the sum. H = 10, one direction a step, and a task with one
ledger entry. Bytes are of envelopes, for a site and round. `gone` is the share of sites that vanish
after they have given shares, so that others' shares take their masks off. Seconds are of one core:
of a site, the mean; of the server, all that it does for the sum. Beside none the server adds up
scalars, which takes no time to speak of. Every sum is compared with that of the plain numbers.
"""

import argparse
import json
import math
import time
from collections import Counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fedforward.core.seeds import SHARED
from fedforward.deployment.secure.party import SumParty
from fedforward.deployment.secure.session import SumSession
from fedforward.federation.secure_sums import EXTRA, part_of
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.envelope import Envelope, MessageKind
from fedforward.messages.report import Report
from fedforward.messages.secure import MaskedReport, SumOpening, SumRoster, SumStart, SumTask
from fedforward.messages.task import Task

STEPS, RUN = 10, bytes(8)


class Meter:
    """Bytes of envelopes and seconds, by direction and by who is at work."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def sent(self, way: str, kind: MessageKind, body: bytes) -> bytes:
        self.bytes[way] += len(Envelope(kind, RUN, body).encode())
        return body

    def timed(self, who: str, act: Any, *given: Any) -> Any:
        began = time.perf_counter()
        found = act(*given)
        self.seconds[who] += time.perf_counter() - began
        return found


def messages(sites: int) -> tuple[bytes, list[Report]]:
    """A task, and a report for each site."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(sites, STEPS)).astype(np.float32)
    entry = Entry(0, (Contribution(SHARED, numbers[0]),))
    task = Task(1, 0, 1e-3, False, (entry,)).encode()
    return task, [Report(1, n, 100, 1.0, 0, own) for n, own in enumerate(numbers)]


def measure(sites: int, gone: int) -> dict[str, Any]:
    """See the module; `gone` sites vanish."""
    meter, (task, reports) = Meter(), messages(sites)
    parts = [part_of(report) for report in reports]
    parties = [SumParty(RUN, client, 3) for client in range(sites)]
    session = SumSession(RUN, 1, 3)

    def exchange(down: MessageKind, up: MessageKind, request: Any, answer: Any, take: Any) -> None:
        for client in range(sites if up is not MessageKind.SUM_OPENED else sites - gone):
            body = meter.sent("down", down, meter.timed("server", request, client))
            reply = meter.timed("site", answer, parties[client], body).encode()
            meter.timed("server", take, meter.sent("up", up, reply), client)

    exchange(
        MessageKind.SUM_START,
        MessageKind.SUM_KEYS,
        session.start,
        lambda party, body: party.start(SumStart.decode(body)),
        session.take_keys,
    )
    meter.timed("server", session.make_roster)
    exchange(
        MessageKind.SUM_ROSTER,
        MessageKind.SUM_SHARES,
        lambda client: session.roster(),
        lambda party, body: party.share(SumRoster.decode(body)),
        session.take_shares,
    )
    masked: dict[int, MaskedReport] = {}
    for client in range(sites):
        body = meter.timed("server", session.task, client, task)
        meter.sent("down", MessageKind.SUM_TASK, body)
        if client < sites - gone:
            report = meter.timed(
                "site", lambda n, b: parties[n].mask(SumTask.decode(b), parts[n]), client, body
            )
            meter.sent("up", MessageKind.MASKED_REPORT, report.encode())
            masked[client] = report
    summed = sorted(masked)
    exchange(
        MessageKind.SUM_OPENING,
        MessageKind.SUM_OPENED,
        lambda client: session.opening(summed),
        lambda party, body: party.open(SumOpening.decode(body)),
        session.take_opened,
    )
    masks = meter.timed("server", session.masks, STEPS + EXTRA)
    total = np.sum([masked[n].values for n in summed], axis=0, dtype=np.uint64) - masks
    plain = np.sum([parts[n].values for n in summed], axis=0, dtype=np.uint64)
    assert (total == plain).all(), "the sum is not that of the plain numbers"
    none = Meter()
    none.sent("down", MessageKind.TASK, task)
    none.sent("up", MessageKind.REPORT, reports[0].encode())
    return {
        "sites": sites,
        "gone": gone,
        "up": round(meter.bytes["up"] / sites),
        "up, none": none.bytes["up"],
        "down": round(meter.bytes["down"] / sites),
        "down, none": none.bytes["down"],
        "site s": round(meter.seconds["site"] / sites, 4),
        "server s": round(meter.seconds["server"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 100])
    parser.add_argument("--gone", type=float, default=0.1, help="share of sites that vanish")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cases = [
        (sites, gone)
        for sites in given.sites
        for gone in sorted({0, min(math.ceil(given.gone * sites), sites - (2 * sites // 3 + 1))})
    ]
    hidden = Console(stderr=True)
    rows = [measure(*case) for case in track(cases, "sums", console=hidden, transient=True)]
    if given.json:
        print(json.dumps(rows))
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,}" if value != 0 else "0" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
