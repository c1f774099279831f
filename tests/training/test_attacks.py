"""Every attack against its equation, and runs with liars: repeatable, and replayed bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.data.examples import Example, Flipped
from fedforward.messages.report import Report
from fedforward.methods.aggregation import krum_order
from fedforward.methods.decomfl import DeComFL
from fedforward.methods.feedsign import FeedSign
from fedforward.training.attacks import ATTACKS, Attack, Scene

RANDOM = np.random.default_rng(1)
HONEST = RANDOM.standard_normal((8, 5)) + np.array([2.0, -2.0, 1.0, 0.5, -0.5])
OWN = RANDOM.standard_normal((2, 5)) + np.array([2.0, -2.0, 1.0, 0.5, -0.5])


def lies(name: str, factor: float = 10.0, honest: Any = HONEST) -> Any:
    randoms = [np.random.default_rng(n) for n in range(2)]
    return ATTACKS[name](Scene(honest, OWN, factor, randoms))


def test_liars_that_are_alone_change_what_they_have_measured() -> None:
    sizes = np.sqrt((OWN**2).mean(axis=1))
    assert np.array_equal(lies("sign-flip"), -OWN)
    assert np.array_equal(lies("scale", 1000.0), 1000.0 * OWN)
    assert np.allclose(lies("constant", 3.0), 3.0 * sizes[:, None] * np.ones(5))
    drawn = [np.random.default_rng(n).standard_normal(5) for n in range(2)]
    assert np.allclose(lies("random", 4.0), 4.0 * sizes[:, None] * drawn)


def test_a_little_is_enough_stays_within_the_spread() -> None:
    mean, spread = HONEST.mean(axis=0), HONEST.std(axis=0)
    found = lies("little-is-enough", 1.5)
    assert np.allclose(found, mean - 1.5 * spread * np.sign(mean))
    assert np.array_equal(found[0], found[1])
    assert np.abs(found[0] - mean) / spread == pytest.approx(1.5), "and no further"


def test_a_trim_attack_lies_just_beyond_the_last_honest_client() -> None:
    """Fang et al.: in [w_max, 2 w_max] or [w_max / 2 ..., w_max], by the sign; b is 2."""
    up = (HONEST.sum(axis=0) + OWN.sum(axis=0)) < 0
    top, bottom = HONEST.max(axis=0), HONEST.min(axis=0)
    # All signs of the extremes are there.
    assert {*(top[up] > 0), *(bottom[~up] < 0)} == {True, False}
    for lie in lies("trim"):
        assert (lie[up] >= top[up]).all() and (lie[~up] <= bottom[~up]).all()
        extreme = np.where(up, top, bottom)
        ratio = lie / extreme
        assert ((ratio >= 0.5) & (ratio <= 2.0)).all() and (ratio != 1.0).any()


def test_krum_chooses_the_krum_attack_and_goes_the_wrong_way() -> None:
    # Honest clients that are far from each other, as in a space of many directions.
    honest = np.random.default_rng(2).standard_normal((8, 40)) + 0.3
    own = np.random.default_rng(3).standard_normal((2, 40)) + 0.3
    found = ATTACKS["krum"](Scene(honest, own, 1.0, ()))
    against = -np.sign(honest.sum(axis=0) + own.sum(axis=0))
    size = abs(found[0, 0])
    assert np.allclose(found, size * against) and size > 0
    assert krum_order(2, np.vstack([found, honest]))[0] < 2
    larger = np.vstack([2.0 * found, honest])
    assert size > 0.05 and (krum_order(2, larger)[0] >= 2 or size > 1.0), "half as much did not do"


def encoded(count: int) -> dict[int, bytes]:
    return {
        n: Report(4, n, 9, 1.0, 0, RANDOM.standard_normal(6).astype(np.float32)).encode()
        for n in range(count)
    }


def test_only_attackers_lie_and_only_in_their_scalars() -> None:
    method, reports = DeComFL(local_steps=6), encoded(5)
    attack = Attack("random", (1, 3, 9), 10.0, run_seed=7)
    sent = attack.sent(method, 4, reports)
    for client, data in enumerate(sent):
        was, now = Report.decode(reports[client]), Report.decode(data)
        assert (data != reports[client]) == (client in (1, 3))
        assert replace(was, gradients=now.gradients).encode() == data
    assert sent == attack.sent(method, 4, reports), "the same every time"
    assert sent != attack.sent(method, 5, reports)
    assert sent != Attack("random", (1, 3), 10.0, run_seed=8).sent(method, 4, reports)
    assert list(reports.values()) == Attack().sent(method, 4, reports)
    assert list(reports.values()) == Attack("label-flip", (1,)).sent(method, 4, reports)


def test_what_float32_does_not_hold_is_as_large_as_it_can_be() -> None:
    (sent,) = Attack("scale", (0,), 1e300).sent(DeComFL(local_steps=6), 4, encoded(1))
    assert np.isfinite(Report.decode(sent).gradients).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_on_votes_is_one_bit_each(name: str) -> None:
    method = FeedSign(local_steps=6)
    reports = {
        n: method.with_scalars(Report.decode(data), Report.decode(data).gradients).encode()
        for n, data in encoded(7).items()
    }
    for data in Attack(name, (0, 5), 10.0).sent(method, 4, reports):
        method.check_report(Report.decode(data), 1)
    flipped = Attack("sign-flip", (5,)).sent(method, 4, reports)
    before, after = (method.scalars(Report.decode(d)) for d in (reports[5], flipped[5]))
    assert np.array_equal(before, -after)


def test_flipped_labels_are_another_label_of_the_same_prompt() -> None:
    choices = tuple(np.array([1, 2, 7 + n]) for n in range(3))
    words = [" a", " b", " c"]
    rows = [
        Example(choices[n], 2, words[n], choices, n, choice_prompts=(2, 2, 2)) for n in range(3)
    ]
    wrong = Flipped(rows, words)
    assert len(wrong) == 3 and [e.right for e in wrong] == [1, 2, 0]
    assert [e.reference for e in wrong] == [" b", " c", " a"]
    assert [e.tokens.tolist() for e in wrong] == [[1, 2, 8], [1, 2, 9], [1, 2, 7]]
    assert [e.right for e in wrong[1:]] == [2, 0]
    (classed,) = Flipped([Example(np.array([5, 6]), 2, "yes", right=1)], ["no", "yes"])
    assert (classed.right, classed.reference, classed.tokens.tolist()) == (0, "no", [5, 6])


@pytest.mark.parametrize("name", ["feedsign", "fedkseed"])
def test_a_run_with_liars_resumes_and_verifies(
    configure: Any, carry_out: Any, tmp_path: Path, name: str
) -> None:
    from fedforward.training.replay import verify

    def settings(rounds: int) -> Any:
        changes = {"method__candidates": 9, "method__aggregator": "clipped-mean"}
        return configure(
            method__name=name,
            federation__clients=4,
            federation__rounds=rounds,
            simulation__attack="random",
            simulation__attackers=[2],
            **(changes if name == "fedkseed" else {}),
        )

    whole = carry_out(settings(4), tmp_path / "whole")
    carry_out(settings(2), tmp_path / "halves")
    halves = carry_out(settings(4), tmp_path / "halves", resume=True)
    assert whole["state_digest"] == halves["state_digest"]
    assert whole["ledger_digest"] == halves["ledger_digest"]
    result = verify(tmp_path / "halves")
    assert not result.differences and result.rounds == 4 and not result.unchecked
    if name == "feedsign":
        # A bit for each scalar, behind what every report has.
        plain = len(Report(0, 0, 1, 1.0, 0, np.empty(0, np.float32)).encode())
        assert whole["bytes_per_client_round"]["up"] < plain + 1 + 16


def test_labels_are_flipped_in_the_batches_of_liars_alone(configure: Any, tmp_path: Path) -> None:
    import json

    from fedforward.training.run import Run

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"q": f"What is {n}?", "a": n % 2}) + "\n" for n in range(24)),
        encoding="utf-8",
    )
    run = Run(
        configure(
            data__source=str(rows),
            data__prompt="{q}",
            data__answer=" {a}",
            data__label_words={"0": "no", "1": "yes"},
            simulation__attack="label-flip",
            simulation__attackers=[1],
        ),
        tmp_path / "run",
    )
    honest, liar = (client.batches for client in run.runtime.clients)
    labels = [
        [stream.examples[n].right - run.corpus.clients[c][n].right for n in range(len(stream))]
        for c, stream in enumerate((honest, liar))
    ]
    assert not any(labels[0]) and all(labels[1])
    assert {stream.reference for stream in liar.examples} == {" no", " yes"}
