"""The protocol of secure sums: exact sums, who may vanish when, and what nobody may learn."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedforward.core.errors import MessageError
from fedforward.deployment.secure import primitives
from fedforward.federation.agreement import QuorumError
from fedforward.federation.secure_sums import threshold_of
from fedforward.messages.codec import Message
from fedforward.messages.secure import (
    MaskedReport,
    OpenShare,
    SumKeys,
    SumOpened,
    SumOpening,
    SumRoster,
    SumShares,
    SumStart,
    SumTask,
)
from tests.support.sums import NUMBERS, Sum, plain, random_values

ALL = (SumStart, SumKeys, SumRoster, SumShares, SumTask, MaskedReport, SumOpening, SumOpened)


def numbers(found: Any) -> list[int]:
    values: list[int] = found.view(np.int64).tolist()
    return values


@pytest.mark.parametrize("clients", [range(3), range(5), [2, 3, 7, 11, 40, 41]])
def test_a_sum_is_exact(clients: Any) -> None:
    values = random_values(clients)
    found = Sum(values)
    found.begin()
    assert numbers(found.open(found.mask())) == plain(values, clients)


@pytest.mark.parametrize("gone", list(itertools.product([0, 1], repeat=4)))
def test_sites_that_vanish_in_any_step(gone: tuple[int, ...]) -> None:
    """Before keys, before shares, before the masked report, and before the sum is opened."""
    values = random_values(range(13))
    found = Sum(values)
    places = {step: [step] * gone[step] for step in range(4)}
    found.begin(places[0], places[1])
    summed = found.mask(without=places[2])
    assert summed == sorted(set(range(13)) - {s for s in range(3) if gone[s]})
    assert numbers(found.open(summed, without=places[3])) == plain(values, summed)


def test_a_report_that_comes_late_stays_masked() -> None:
    """The server has its report and others' shares of its mask key, and still not its numbers."""
    values = random_values(range(5))
    found = Sum(values)
    found.begin()
    found.mask()
    summed = [0, 1, 2, 3]
    assert numbers(found.open(summed)) == plain(values, summed)
    # All that the server can take off: the masks that the late one shares with the others.
    late, session = found.reports[4], found.session
    shares = [
        (client, share.share)
        for client, opened in sorted(session.opened.items())
        for share in opened.shares
        if share.owner == 4
    ]
    context = b"run name" + session.name + (4).to_bytes(4, "little")
    key = primitives.private_key(primitives.combined(shares), context)
    assert primitives.public_bytes(key) == session.keys[4].mask_key
    from fedforward.deployment.secure.party import pairwise

    left = late.values
    for other in summed:
        left = left - pairwise(key, 4, other, session.keys[other], context, NUMBERS)
    own = primitives.mask(
        primitives.derived(found.parties[4]._session.own, b"own mask", context),  # type: ignore[union-attr]
        NUMBERS,
    )
    assert numbers(left) != numbers(values[4]) and numbers(left - own) == numbers(values[4])
    # Nobody gives the other secret now.
    for client in summed:
        with pytest.raises(MessageError, match="A second sum"):
            found.opened(client, [0, 1, 2, 3, 4])


def test_too_few_sites_open_nothing() -> None:
    values = random_values(range(7))
    found = Sum(values)
    found.begin()
    summed = found.mask()
    assert found.session.threshold == threshold_of(7, 3) == 5
    with pytest.raises(QuorumError, match=r"4 sites have sent shares .* takes 5"):
        found.open(summed, without=[0, 1, 2])
    # Their shares go with every secret alike: one more number decides, and each decides otherwise.
    shares = [
        (client, share.share)
        for client, opened in sorted(found.session.opened.items())
        for share in opened.shares
        if share.owner == 0
    ]
    assert len(shares) == 4
    guesses = [n.to_bytes(16, "big") for n in range(300)]
    assert len({primitives.combined([*shares, (0, guess)]) for guess in guesses}) == 300


def test_the_server_sees_the_same_of_other_numbers_with_the_same_sum() -> None:
    """A view with other numbers is as likely: the same masks move with them."""
    values = random_values(range(4))
    shift = random_values([0], seed=9)[0]
    other = {**values, 0: values[0] + shift, 1: values[1] - shift}
    sums = []
    for given_values in (values, other):
        found = Sum(given_values)
        found.begin()
        sums.append(numbers(found.open(found.mask())))
    assert sums[0] == sums[1]


@pytest.mark.parametrize("value", [0, 1, 2**63])
def test_a_masked_report_looks_uniform(value: int) -> None:
    """Each of its 64 bits is one as often as not, whatever the number below."""
    bits = np.zeros(64)
    count = 0
    for _ in range(12):
        found = Sum({client: np.full(200, value, np.uint64) for client in range(3)})
        found.begin()
        masked = found.report(1).values
        bits += [int(((masked >> np.uint64(bit)) & np.uint64(1)).sum()) for bit in range(64)]
        count += len(masked)
        assert len(set(masked.tolist())) == 200
    # Six standard deviations of 2,400 fair coins.
    assert (np.abs(bits - count / 2) < 6 * np.sqrt(count) / 2).all()


def test_no_secret_of_a_site_is_in_what_the_server_sees() -> None:
    found = Sum(random_values(range(5)))
    found.begin()
    session = found.parties[2]._session
    assert session is not None
    kept = (session.own, session.mask_secret, session.share_secret, found.values[2].tobytes())
    found.open(found.mask(without=[4]))
    view = b"".join(data for client in found.seen for data in found.seen[client])
    assert len(view) > 1000
    for secret in kept:
        assert secret and secret not in view


def test_a_site_never_gives_both_secrets() -> None:
    found = Sum(random_values(range(6)))
    found.begin()
    summed = found.mask(without=[5])
    first = found.opened(0, summed)
    assert {(s.owner, s.secret) for s in first.shares} == {*((n, 0) for n in range(5)), (5, 1)}
    assert found.opened(0, summed).encode() == first.encode(), "asked again it says the same"
    for other in ([0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]):
        with pytest.raises(MessageError, match="A second sum of one round"):
            found.opened(0, other)


def test_a_new_attempt_opens_no_other_sum_of_the_round() -> None:
    """Of two sums of one round the difference would be somebody's numbers."""
    values = random_values(range(5))
    found = Sum(values)
    found.begin()
    found.opened(0, found.mask())
    again = Sum(values, parties=found.parties)
    again.begin()
    assert again.session.required() == (0, 1, 2, 3, 4)
    again.mask()
    with pytest.raises(MessageError, match="A second sum of one round"):
        again.opened(0, [0, 1, 2, 3])
    assert numbers(again.open(range(5))) == plain(values, range(5))
    later = Sum(values, parties=found.parties, round=5)
    later.begin()
    assert later.session.required() == ()
    assert numbers(later.open(later.mask(without=[4]))) == plain(values, range(4))


def test_a_site_masks_one_report_of_a_session() -> None:
    found = Sum(random_values(range(4)))
    found.begin()
    first = found.report(0)
    found.values[0] = found.values[0] + np.uint64(1)
    assert found.report(0).encode() == first.encode()
    assert found.parties[0].masked(found.task(0)) is not None


def test_a_site_opens_no_sum_below_its_threshold() -> None:
    found = Sum(random_values(range(4)), least=4)
    found.begin()
    found.mask()
    with pytest.raises(MessageError, match=r"of 3 sites was refused: it takes 4"):
        found.opened(0, [0, 1, 2])
    alone = Sum(random_values(range(4)))
    alone.begin()
    with pytest.raises(MessageError, match=r"A sum of 2 sites was refused: it takes 3"):
        task = alone.task(0)
        alone.parties[0].mask(
            replace(task, shares=task.shares[:1]), MaskedReport(4, 0, alone.values[0])
        )


def roster_of(found: Sum) -> SumRoster:
    for client in found.values:
        found.session.take_keys(found.keys(client).encode(), client)
    found.session.make_roster()
    return SumRoster.decode(found.session.roster())


SPOILT: dict[str, Callable[[SumRoster], SumRoster]] = {
    "another key of this site": lambda r: replace(
        r, members=(replace(r.members[0], mask_key=bytes(range(32))), *r.members[1:])
    ),
    "without this site": lambda r: replace(r, members=r.members[1:]),
    "a site twice": lambda r: replace(r, members=(*r.members, r.members[-1])),
    "out of order": lambda r: replace(r, members=r.members[::-1]),
    "a key twice": lambda r: replace(
        r,
        members=(*r.members[:-1], replace(r.members[-1], mask_key=r.members[1].mask_key)),
    ),
    "of another session": lambda r: replace(r, session=bytes(16)),
    "of another round": lambda r: replace(r, round=5),
    "too few": lambda r: replace(r, members=r.members[:2]),
    "nobody": lambda r: replace(r, members=()),
}


@pytest.mark.parametrize("what", list(SPOILT))
def test_a_spoilt_list_of_sites_is_refused(what: str) -> None:
    found = Sum(random_values(range(4)))
    roster = roster_of(found)
    with pytest.raises(MessageError):
        found.parties[0].share(SPOILT[what](roster))
    shares = found.parties[0].share(roster)
    assert found.parties[0].share(roster).encode() == shares.encode()
    with pytest.raises(MessageError, match="Another list"):
        found.parties[0].share(replace(roster, members=roster.members[:3]))


def test_sites_that_were_told_of_others_cannot_read_shares() -> None:
    """Else a site could be given a short list, whose few shares its own members are asked for."""
    values = random_values(range(9))
    found = Sum(values)
    roster = roster_of(found)
    short = replace(roster, members=roster.members[:3])
    given_shares = {
        client: found.parties[client].share(short if client == 0 else roster) for client in range(9)
    }
    for client in (1, 2):
        shares = [
            share
            for sender in range(9)
            for share in given_shares[sender].shares
            if share.recipient == client
        ]
        task = SumTask(found.session.name, b"task", tuple(shares))
        found.parties[client].mask(task, MaskedReport(4, client, values[client]))
        opened = found.parties[client].open(
            SumOpening(4, found.session.name, np.arange(9, dtype=np.uint64))
        )
        assert [share.owner for share in opened.shares] == list(range(1, 9))


def test_a_site_opens_no_sum_that_it_is_not_in() -> None:
    found = Sum(random_values(range(7)))
    found.begin()
    found.mask()
    with pytest.raises(MessageError, match="this one among them"):
        found.opened(6, [0, 1, 2, 3, 4])


def test_a_public_key_that_agrees_with_nobody_is_refused() -> None:
    found = Sum(random_values(range(4)))
    keys = found.keys(0)
    for key in ("share_key", "mask_key"):
        with pytest.raises(MessageError, match="nothing can be agreed on"):
            found.session.take_keys(replace(keys, **{key: bytes(32)}).encode(), 0)
    with pytest.raises(MessageError, match="of another site"):
        found.session.take_keys(keys.encode(), 1)
    found.session.take_keys(keys.encode(), 0)
    with pytest.raises(MessageError, match="there already"):
        found.session.take_keys(replace(keys, client=1).encode(), 1)


def test_shares_that_were_altered_are_done_without() -> None:
    """One site's shares for another are noise: the others' are enough."""
    values = random_values(range(5))
    found = Sum(values)
    found.begin()
    shares = found.session.shares[3]
    spoilt = tuple(
        replace(share, sealed=bytes(48)) if share.recipient == 0 else share
        for share in shares.shares
    )
    found.session.shares[3] = replace(shares, shares=spoilt)
    assert numbers(found.open(found.mask())) == plain(values, range(5))
    assert [share.owner for share in found.session.opened[0].shares] == [0, 1, 2, 4]


@pytest.mark.parametrize("liar", range(5))
def test_a_wrong_share_changes_no_sum(liar: int) -> None:
    values = random_values(range(5))
    found = Sum(values)
    found.begin()
    summed = found.mask()
    for client in summed:
        opened = found.opened(client, summed)
        if client == liar:
            lies = tuple(replace(share, share=bytes(16)) for share in opened.shares)
            opened = replace(opened, shares=lies)
        found.session.take_opened(opened.encode(), client)
    total = np.sum([found.reports[c].values for c in summed], axis=0, dtype=np.uint64)
    assert numbers(total - found.session.masks(NUMBERS)) == plain(values, summed)
    # Without a share to spare nothing is opened, and no wrong sum either.
    other = next(client for client in range(5) if client != liar)
    found.session.opened.pop(other)
    with pytest.raises(QuorumError, match="cannot be taken off"):
        found.session.masks(NUMBERS)


def test_what_nobody_asked_for_is_refused() -> None:
    found = Sum(random_values(range(4)))
    found.begin()
    summed = found.mask()
    opened = found.opened(1, summed)
    spoilt: list[SumOpened] = [
        replace(opened, shares=(*opened.shares, OpenShare(9, 0, bytes(16)))),
        replace(opened, shares=opened.shares[::-1]),
        replace(opened, shares=(OpenShare(0, 1, bytes(16)),)),
        replace(opened, session=bytes(16)),
        replace(opened, client=2),
    ]
    for message in spoilt:
        with pytest.raises(MessageError):
            found.session.take_opened(message.encode(), 1)
    shares = found.session.shares[1]
    for changed in (
        replace(shares, shares=shares.shares[1:]),
        replace(shares, shares=tuple(replace(s, sender=2) for s in shares.shares)),
    ):
        with pytest.raises(MessageError):
            found.session.take_shares(changed.encode(), 1)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(kind=st.sampled_from(ALL), data=st.binary(max_size=300))
def test_noise_is_refused(kind: type[Message], data: bytes) -> None:
    with pytest.raises(MessageError):
        kind.decode(data)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    step=st.integers(0, 3),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=3),
    cut=st.integers(0, 60),
)
def test_altered_messages_end_in_a_sentence_or_the_same_sum(
    step: int, changes: list[tuple[int, int]], cut: int
) -> None:
    """Of site 1, on the way to the server."""
    values = random_values(range(5))
    found = Sum(values)

    def altered(message: Any) -> bytes:
        data = bytearray(message.encode())
        for place, value in changes:
            data[place % len(data)] ^= value
        return bytes(data[: len(data) - cut])

    takes: list[Any] = [found.session.take_keys, found.session.take_shares]
    try:
        for place, (make, take) in enumerate(zip((found.keys, found.shares), takes, strict=True)):
            for client in values:
                message = make(client)
                take(altered(message) if (place, client) == (step, 1) else message.encode(), client)
            if place == 0:
                found.session.make_roster()
        summed = found.mask()
        if step == 2:
            report = MaskedReport.decode(altered(found.reports[1]))
            assert len(report.values) != NUMBERS or report.client != 1 or report.values.any()
            return
        for client in summed:
            opened = found.opened(client, summed)
            data = altered(opened) if step == 3 and client == 1 else opened.encode()
            found.session.take_opened(data, client)
        masks = found.session.masks(NUMBERS)
    except (MessageError, QuorumError):
        return
    total = np.sum([found.reports[c].values for c in summed], axis=0, dtype=np.uint64)
    assert numbers(total - masks) == plain(values, summed)
