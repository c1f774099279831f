"""Where the seconds of a round went, from what a server and its sites noted (`timings`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

#: The moments of a message, in their order, and who notes them.
SERVER_MOMENTS = ("sending", "sent", "fetched", "answering", "answered", "arrived")
SITE_MOMENTS = ("taken", "asked", "replied", "pushed")
#: A round's parts in their order: from which moment to which, and in words. A part whose moments
#: nobody noted is in the part of the site as a whole.
PARTS = (
    ("closing", "sending", "server: closes the round before, makes the tasks"),
    ("sending", "sent", "server: hands the tasks to the engine"),
    ("sent", "fetched", "wire: until the site has fetched its task"),
    ("fetched", "taken", "site: SuperNode, until the executor has the task"),
    ("taken", "asked", "site: reads the task"),
    ("asked", "replied", "site: the model server"),
    ("replied", "answering", "site: SuperNode, until it begins to answer"),
    ("answering", "answered", "wire: the answer"),
    ("answered", "arrived", "server: until the coordinator has it"),
)
#: What takes the place of the site's parts where only the server's moments are known.
AT_SITE = ("fetched", "answering", "site: all")


@dataclass
class RoundParts:
    """One round on the way of the site that answered last.

    Attributes:
        site: that site.
        seconds: by the parts' words; their sum is the round.
        up: bytes on the wire from all sites since the round before, where they were counted.
        down: likewise to them.
    """

    site: str
    seconds: dict[str, float]
    up: int = 0
    down: int = 0

    @property
    def total(self) -> float:
        """Seconds of the round."""
        return sum(self.seconds.values())


def messages(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a server's notes that were answered, each with its moments, by arrival."""
    open_: dict[str, dict[str, Any]] = {}
    done = []
    for event in sorted(events, key=lambda event: event["at"]):
        site, what = event["site"], event["what"]
        if what == "sending":
            open_[site] = {"site": site, "round": event.get("round")}
        message = open_.get(site)
        if message is None or what not in SERVER_MOMENTS:
            continue
        message[what] = event["at"]
        message |= {way: event[way] for way in ("up", "down") if way in event}
        if what == "arrived":
            done.append(open_.pop(site))
    return done


def with_sites(
    answered: Sequence[dict[str, Any]], sites: Mapping[str, Iterable[Mapping[str, Any]]]
) -> None:
    """Add the moments that sites noted to the messages that they belong to."""
    for message in answered:
        began, over = message.get("sending"), message["arrived"]
        for event in sites.get(message["site"], ()):
            if began is not None and began <= event["at"] <= over:
                message.setdefault(event["what"], event["at"])


def rounds(answered: Sequence[Mapping[str, Any]]) -> list[RoundParts]:
    """The rounds, without the first: nobody noted how it began."""
    by_round: dict[int, list[Mapping[str, Any]]] = {}
    for message in answered:
        if message["round"] is not None:
            by_round.setdefault(message["round"], []).append(message)
    groups = [by_round[number] for number in sorted(by_round)]
    arrivals = sorted(message["arrived"] for message in answered)
    found = []
    for before, group in pairwise(groups):
        last = max(group, key=lambda message: message["arrived"])
        began = min(message["sending"] for message in group)
        # An evaluation between two rounds belongs to neither.
        closing = max((at for at in arrivals if at <= began), default=began)
        found.append(
            RoundParts(
                last["site"],
                _parts({**last, "closing": closing}),
                *(_bytes(before, group, way) for way in ("up", "down")),
            )
        )
    return found


def _bytes(
    before: Sequence[Mapping[str, Any]], group: Sequence[Mapping[str, Any]], way: str
) -> int:
    first, last = (max((m.get(way, 0) for m in part), default=0) for part in (before, group))
    return max(0, last - first)


def _parts(moments: Mapping[str, Any]) -> dict[str, float]:
    """Seconds between the moments that are known; one that is missing is skipped."""
    site = all(moment in moments for moment in SITE_MOMENTS[:-1])
    parts = [part for part in PARTS if site or not {part[0], part[1]} & set(SITE_MOMENTS)]
    if not site:
        parts.insert(3, AT_SITE)
    seconds, now = {}, moments["closing"]
    for _, end, words in parts:
        # A moment of another process may be noted a little late.
        then = max(now, moments.get(end, now))
        seconds[words], now = then - now, then
    return seconds
