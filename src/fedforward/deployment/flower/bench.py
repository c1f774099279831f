"""What a federation's rounds cost, from what its server and sites noted: `bench-federation`."""

import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedforward.core.errors import FedForwardError
from fedforward.deployment.flower import timeline
from fedforward.deployment.flower.timings import FILE, read
from fedforward.training.run_directory import RunDirectory

_STEPS = re.compile(r"^round (\d+): \d+ steps in (.*) s$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """A part of a round, in seconds over the rounds: the median, and the most."""

    part: str
    median: float
    most: float


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        sites: their number.
        rounds: that were measured; the first is left out.
        round: the whole of a round.
        parts: of a round, on the way of the site that answered last.
        steps: the local steps of the slowest site; None where sites' own logs cannot be read.
        wire: bytes "up" and "down", site and round, with TLS; None where they are not counted.
        messages: the same of the envelopes alone; None where the run's metrics lack them.
        reconnects: of each site since the beginning.
    """

    sites: int
    rounds: int
    round: Part
    parts: tuple[Part, ...]
    steps: Part | None
    wire: dict[str, float] | None
    messages: dict[str, float] | None
    reconnects: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """For machines. Times are in seconds, traffic in bytes."""
        return asdict(self)


def measured(run: Path, sites: Mapping[str, Path]) -> Measured:
    """What a run's folder tells.

    Args:
        sites: folders (`site.out`) of those that are on this machine, by name.

    Raises:
        FedForwardError: there are fewer than two whole rounds in it.
    """
    events = read(run / "flower" / FILE)
    answered = timeline.messages(events)
    notes = {
        name: read(path)
        for name, home in sites.items()
        if (path := home / "flower" / FILE).is_file()
    }
    timeline.with_sites(answered, notes)
    rounds = timeline.rounds(answered)
    if not rounds:
        raise FedForwardError(
            f"{run} has fewer than two rounds that sites answered, so there is nothing to measure. "
            "Look at what the server and the sites say."
        )
    names = {message["site"] for message in answered}
    words = max((found.seconds for found in rounds), key=len)
    asked = len(rounds) * len(names)
    up, down = sum(found.up for found in rounds), sum(found.down for found in rounds)
    lines = RunDirectory(run).read_metrics(len(rounds) + 1)[2:]
    connects = Counter(event["site"] for event in events if event["what"] == "connected")
    return Measured(
        sites=len(names),
        rounds=len(rounds),
        round=_part("a round", [found.total for found in rounds]),
        parts=tuple(_part(name, [f.seconds.get(name, 0.0) for f in rounds]) for name in words),
        steps=_steps(sites, len(rounds) + 1),
        wire={"up": up / asked, "down": down / asked} if up else None,
        messages={
            way: statistics.mean(line["bytes"][way] for line in lines) for way in ("up", "down")
        }
        if lines
        else None,
        reconnects={name: max(0, connects[name] - 1) for name in sorted(names)},
    )


def _part(words: str, seconds: Sequence[float]) -> Part:
    return Part(words, statistics.median(seconds), max(seconds))


def _steps(sites: Mapping[str, Path], last: int) -> Part | None:
    """The slowest site's local steps, round by round, from the sites' logs."""
    slowest: dict[int, float] = {}
    for home in sites.values():
        log = home / "model-server.log"
        if not log.is_file():
            return None
        for number, seconds in _STEPS.findall(log.read_text(encoding="utf-8", errors="replace")):
            if 2 <= int(number) <= last:
                slowest[int(number)] = max(slowest.get(int(number), 0.0), float(seconds))
    return _part("local steps of the slowest site", list(slowest.values())) if slowest else None
