"""Secure sums across machines: sites mask their reports, and the server learns their sum alone.

What needs the cryptography of the extra `flower` is imported where a run has secure sums.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedforward.config.schema import Config
from fedforward.deployment.participants import Participants
from fedforward.federation.server import Server

if TYPE_CHECKING:
    from fedforward.deployment.secure.rounds import SumRounds
    from fedforward.deployment.secure.site_side import SumSite


def sum_rounds(
    config: Config, participants: Participants, server: Server, poll: Callable[[], None]
) -> "SumRounds":
    """The coordinator's steps of each round."""
    from fedforward.deployment.secure.rounds import SumRounds

    return SumRounds(participants, server, config.federation.secure_threshold, poll)


def sum_site(run: bytes, config: Config) -> "SumSite | None":
    """What masks a site's reports; None where the terms have no secure sums."""
    if not config.federation.secure_sums:
        return None
    from fedforward.deployment.secure.site_side import SumSite

    return SumSite(run, config.federation)
