"""Figures, words and page of a comparison, from runs whose figures are made by hand."""

import csv
import json
import re
from dataclasses import replace
from io import StringIO
from math import nan
from pathlib import Path
from typing import Any

import pytest

from fedforward.config.loading import validate
from fedforward.core.errors import FedForwardError
from fedforward.reporting import comparison
from fedforward.reporting.comparison import MOST_GROUPS, as_csv, as_json, cells, compare, sentences
from fedforward.reporting.groups import Group, check_comparable, grouped
from fedforward.reporting.page import make_comparison_page
from fedforward.reporting.record import RunRecord
from tests.support.browser import BROWSER, WELL, drawn
from tests.support.pages import Page

EVIL = "<script>alert(1)</script>"


def record(
    seed: int,
    losses: list[float],
    *,
    stopped: str | None = None,
    finished: bool = True,
    path: str = "",
    scale: float = 1.0,
    metrics: dict[str, float] | None = None,
    **keys: Any,
) -> RunRecord:
    """A run of one evaluation a round."""
    content: dict[str, Any] = {"model": {"path": "m"}, "data": {"source": "d.jsonl"}}
    content["run"] = {"seed": seed, "evaluate_every": 1}
    content["federation"] = {"rounds": len(losses) - 1}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        content.setdefault(section, {})[name] = value
    lines = [
        {"round": n, "heldout_loss": loss, "seconds": float(n), "training_loss": loss,
         "skipped_steps": 0, "learning_rates": {0: 0.1}, "passes": 4.0 * n * scale,
         "bytes": {"up": 60.0 * scale, "down": 40.0 * scale}, "metrics": metrics or {}}
        for n, loss in enumerate(losses)
    ]  # fmt: skip
    summary = {"stopped": stopped, "rounds": len(losses) - 1, "peak_memory_bytes": 5_000_000,
               "state_digest": "ab" * 32}  # fmt: skip
    return RunRecord(
        path=Path(path or f"runs/{seed}-{losses[-1]}"),
        config=validate(content),
        lines=lines,
        summary=summary if finished else None,
        environment={},
        clients=None,
        divided=None,
        answer=None,
    )


def group(label: str, ends: list[float], **more: Any) -> Group:
    return Group(label, {n: record(n, [2.0, 1.5, end], **more) for n, end in enumerate(ends)})


def test_the_table_by_hand() -> None:
    results = compare(
        [
            group("a", [1.0, 1.1, 1.2]),
            group("b", [1.01, 1.12, 1.17], scale=1000.0),
            group("c", [0.5, 0.6, 0.71]),
        ],
        "2 rounds",
    )
    assert results.measure == "loss" and results.lower and results.before.mean == 2.0
    a, b, c = results.rows
    assert (a.final.mean, a.final.sd) == (pytest.approx(1.1), pytest.approx(0.1))
    assert a.spent["bytes"].mean == 200.0 and b.spent["passes"].mean == 8000.0
    assert cells(a, results)[:5] == ["a (fedmezo)", "auto", "3", "1.1000 ± 0.1000",
                                     "1.1000 ± 0.1000"]  # fmt: skip
    assert cells(a, results)[6:] == ["2", "8", "2", "200 B", "5.0 MB", "0 of 3"]
    assert c.verdict == "best mean" and a.verdict.startswith("worse (p")
    told = sentences(results)
    assert told[0].startswith("b and a: indistinguishable (paired t test, 3 seeds, p = ")
    assert re.match(r"c is lower than a by 0\.4967 \(95 % interval -0\.51\d+ to -0\.48", told[1])
    rows = list(csv.DictReader(StringIO(as_csv(results))))
    assert float(rows[0]["final_mean"]) == a.final.mean and rows[0]["verdict"] == a.verdict
    assert float(rows[1]["bytes_sd"]) == 0.0
    content = as_json(results)
    assert len(content["runs"]) == 9 and content["matched"] == "2 rounds"
    assert content["differences"][1]["told_apart"] is True
    json.dumps(content)


def test_one_seed_cannot_tell() -> None:
    results = compare([group("a", [1.0]), group("b", [0.5])])
    assert sentences(results) == ["b and a: one seed cannot tell."]
    assert [row.verdict for row in results.rows] == ["one seed cannot tell", "best mean"]
    assert cells(results.rows[0], results)[3] == "1.0000"


def test_diverged_and_unfinished_runs() -> None:
    runs = {0: record(0, [2.0, 1.0]), 1: record(1, [2.0, 9.0], stopped="diverged: it rose")}
    some = Group("some", runs)
    cut = Group("cut", {n: record(n, [2.0, 1.1], finished=n > 0) for n in range(2)})
    lost = Group("lost", {0: record(0, [2.0, nan], stopped="diverged: nothing")})
    results = compare([some, cut, lost])
    assert results.rows[0].diverged == 1 and results.rows[0].final.mean == 1.0
    assert {each.why_not for each in results.differences} == {
        "1 of 2 runs of some diverged", "1 of 1 runs of lost diverged",
    }  # fmt: skip
    assert results.rows[1].unfinished == 1
    text = " ".join(results.remarks)
    assert "1 of 2 runs of some diverged. They are in no mean" in text
    assert "1 of 2 runs of cut are not finished" in text and "All runs of lost diverged" in text
    page = make_comparison_page(results)
    assert "1 of 2 runs of some diverged" in page


def test_more_of_a_score_is_better() -> None:
    made = []
    for label, f1 in (("low", 0.2), ("high", 0.9)):
        runs = {
            n: record(n, [2.0, 1.0], metrics={"f1": f1 + 0.001 * n}, method__objective="f1")
            for n in range(2)
        }
        made.append(Group(label, runs))
    results = compare(made)
    assert results.measure == "f1" and not results.lower
    assert [row.verdict.split()[0] for row in results.rows] == ["worse", "best"]
    assert "final held-out f1" in comparison.head(results)
    assert "final held-out loss" in comparison.head(results)
    page = make_comparison_page(results)
    assert "Held-out f1 against bytes" in page and "Held-out loss against bytes" in page


def test_runs_are_grouped_and_named_by_what_differs() -> None:
    found = grouped([
        record(1, [2.0, 1.0]), record(0, [2.0, 1.1]),
        record(0, [2.0, 1.0], method__mu=0.1), record(0, [2.0, 1.0], method__name="decomfl"),
    ])  # fmt: skip
    assert [(each.label, list(each.runs)) for each in found] == [
        ("fedmezo mu=0.001", [0, 1]), ("fedmezo mu=0.1", [0]), ("decomfl", [0]),
    ]  # fmt: skip
    with pytest.raises(FedForwardError, match=r"the same run\.seed = 0"):
        grouped([record(0, [2.0, 1.0]), record(0, [2.0, 1.0], path="x")])
    with pytest.raises(FedForwardError, match=r"data\.heldout is 0\.01 and 7"):
        check_comparable(grouped([record(0, [2.0, 1.0]), record(0, [2.0, 1.0], data__heldout=7.0)]))


def test_curves_are_means_over_seeds_at_the_rounds_that_all_have() -> None:
    runs = {0: record(0, [2.0, 1.0, 0.5]), 1: record(1, [2.0, 1.2])}
    x, means, spread = comparison._mean_curve(list(runs.values()), "loss", "bytes")
    assert x == [0.0, 100.0] and means == [2.0, pytest.approx(1.1)]
    assert spread == [0.0, pytest.approx(0.1414, abs=1e-4)]
    # A thousand times the bytes: the axis is logarithmic, and every method has its rows.
    results = compare([group("a", [1.0, 1.1]), group("b", [1.0, 1.1], scale=1e3)])
    chart = next(c for c in comparison.charts_of(results) if "bytes" in c.title)
    assert chart.head == ["method", "bytes", "mean", "sd"]
    assert [row[0] for row in chart.rows] == ["a"] * 3 + ["b"] * 3
    assert chart.rows[2] == ["a", "200", "1.05", "0.07071"]
    assert [key.name for key in chart.keys] == ["a", "b"]


def test_nothing_of_a_run_is_read_as_html() -> None:
    bad = [Group(EVIL, {0: record(0, [2.0, 1.0], path=f"runs/{EVIL}", model__path=EVIL)})]
    text = make_comparison_page(compare([*bad, group("b", [1.0])], EVIL), [EVIL])
    assert "<script" not in text and text.count("&lt;script&gt;") >= 6
    page = Page(text)
    assert not {"script", "link", "img"} & set(page.tags)
    assert all(place.startswith("#") for place in page.loaded)
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("table") == len(page.figures) + 2


def test_too_many_groups() -> None:
    many = [group(str(n), [1.0]) for n in range(MOST_GROUPS + 1)]
    with pytest.raises(FedForwardError, match=f"at most {MOST_GROUPS} groups"):
        make_comparison_page(compare(many))


def test_one_group_has_nothing_to_be_compared_with() -> None:
    results = compare([group("a", [1.0, 1.1])])
    assert results.differences == [] and results.rows[0].verdict == ""
    assert "What can be told apart" not in make_comparison_page(results)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_without_overflow(width: int, tmp_path: Path) -> None:
    made = [group(f"a-long-label-{n}", [1.0 + n, 1.1 + n, 1.3 + n]) for n in range(6)]
    long = {n: replace(run, path=Path("/a/folder" * 20)) for n, run in made[0].runs.items()}
    text = make_comparison_page(
        compare([Group("first", long), *made], "12 rounds"), [f"fedforward compare {'x' * 300}"]
    )
    assert drawn(text, width, tmp_path) == WELL
