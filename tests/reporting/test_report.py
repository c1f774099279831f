"""The page of a run: what is on it, that nothing of a run is read as HTML, and bad folders."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedforward.federation.ledger import Ledger, Round
from fedforward.messages.entry import Contribution, Entry
from fedforward.messages.report import ClientResult, Report
from fedforward.reporting.charts import Series, line_chart, named
from fedforward.reporting.page import MOST_RUNS, make_page
from fedforward.reporting.record import read_run
from tests.support.browser import BROWSER, WELL, drawn
from tests.support.command_line import command, write_config
from tests.support.pages import Page

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds, whose clients are divided by a field; tests copy it."""
    folder = tmp_path_factory.mktemp("report")
    changes = ("federation.partition=by-field", "federation.field=site", "federation.clients=3")
    result = command("run", write_config(folder), *changes, "--out", folder / "run")
    assert result.code == 0, result
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_the_page_has_the_run_and_loads_nothing(copy: Path) -> None:
    result = command("report", copy, "--verify", "--json")
    assert result.code == 0, result
    told = json.loads(result.out)
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert told["page"] == str(copy / "report.html") and told["bytes"] == len(text.encode())
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(place.startswith(("#", "data:image/png;base64,")) for place in page.loaded)
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    anchors = {place[1:] for place in page.loaded if place.startswith("#")}
    assert anchors <= set(page.ids)
    # Every chart has words and a table.
    assert len(page.figures) >= 7
    assert all(figure["aria-label"] for figure in page.figures)
    assert page.tags.count("details") == len(page.figures) + 1
    assert page.tags.count("table") == len(page.figures)
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    assert summary["state_digest"] in text and summary["ledger_digest"] in text
    assert f"Bit-identical: {summary['rounds']} rounds" in text
    assert "fedforward verify" in text and "[federation]" in text
    for title in ("Loss", "Training loss of each client", "Learning rate of each client",
                  "Size of projected gradients", "Participation", "Traffic", "Peak memory",
                  "Partition of the training examples"):  # fmt: skip
        assert f"<figcaption>{title}</figcaption>" in text


def test_the_figures_are_those_of_the_ledger(copy: Path) -> None:
    found = read_run(copy).clients
    assert found is not None and found.clients == [0, 1, 2]
    ledger = Ledger(copy / "ledger.sqlite", read_only=True)
    for number, record in enumerate(ledger.rounds()):
        for result in record.results:
            client = result.report.client
            assert found.loss[number, client] == result.report.loss
            assert found.rate[number, client] == result.learning_rate
            size = np.sqrt(np.mean(np.float64(result.report.gradients) ** 2))
            assert found.size[number, client] == pytest.approx(size, rel=1e-12)
            assert found.took_part[number, client]
    ledger.close()


def test_how_examples_are_divided(copy: Path) -> None:
    rows = json.loads((copy / "clients.json").read_text(encoding="utf-8"))["labels"]
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    assert [sum(row.values()) for row in rows] == summary["examples"]
    # By field: each client has one site's examples alone.
    assert sorted(name for row in rows for name, count in row.items() if count) == [
        "s0",
        "s1",
        "s2",
    ]
    (copy / "clients.json").write_text("[]", encoding="utf-8")
    assert "<figcaption>Training examples</figcaption>" in make_page([read_run(copy)])


def test_nothing_of_a_run_is_read_as_html(copy: Path, tmp_path: Path) -> None:
    lines = lines_of(copy)
    for line in lines:
        if "heldout_loss" in line:
            line["metrics"] = {EVIL: 1.0, "$x_1$": 2.0}
    lines[0]["example"] = {"prompt": EVIL, "expected": EVIL, "before": EVIL}
    write_lines(copy, lines)
    (copy / "clients.json").write_text(
        json.dumps({"by": EVIL, "labels": [{EVIL: 2, "</svg>": 1}], "blocks": []}), encoding="utf-8"
    )
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    summary |= {"stopped": EVIL, "example": dict.fromkeys(("prompt", "before", "after"), EVIL)}
    summary["example"]["expected"] = EVIL
    (copy / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    config = (copy / "config.toml").read_text(encoding="utf-8")
    (copy / "config.toml").write_text(f"# {EVIL}\n{config}", encoding="utf-8")
    environment = {"python": EVIL, "packages": {EVIL: EVIL}}
    (copy / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    named_so = copy.rename(tmp_path / "<script>x")
    text = make_page([read_run(named_so)], {named_so: EVIL})
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
    page = Page(text)
    assert page.tags.count("svg") == text.count("</svg>")


def test_several_runs_on_one_page(copy: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.html"
    result = command("report", copy, run, copy, "--out", out)
    assert result.code == 0 and result.out == f"{out}: {out.stat().st_size / 1000:.0f} kB\n"
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "<title>2 runs" in text and "Held-out loss against rounds" in text
    assert len(page.ids) == len(set(page.ids))
    assert text.count('<th scope="row">copy</th>') == 1 and text.count("<h2>run</h2>") == 1
    # The page may be written again, and nothing else is written over.
    assert command("report", run, "--out", out).code == 0
    other = tmp_path / "other.txt"
    other.write_text("mine", encoding="utf-8")
    command("report", run, "--out", other).refused(str(other), "is no report")
    assert other.read_text(encoding="utf-8") == "mine"


def test_a_run_in_progress(copy: Path) -> None:
    (copy / "summary.json").unlink()
    write_lines(copy, lines_of(copy)[:2])
    text = make_page([read_run(copy)])
    assert "not finished: 1 of 2 rounds" in text and "The run is not done yet." in text
    # The ledger has a round more, which no line tells of.
    assert read_run(copy).ledger_digest in text


def test_a_run_of_no_rounds(copy: Path) -> None:
    (copy / "summary.json").unlink()
    write_lines(copy, lines_of(copy)[:1])
    text = make_page([read_run(copy)])
    assert "0 of 2" in text and "<figcaption>Loss</figcaption>" in text
    assert "<figcaption>Participation</figcaption>" not in text


def test_what_is_damaged_is_said(copy: Path) -> None:
    with (copy / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": 3, "trai')
    (copy / "summary.json").write_text("{", encoding="utf-8")
    data = bytearray((copy / "ledger.sqlite").read_bytes())
    data[:16] = b"x" * 16
    (copy / "ledger.sqlite").write_bytes(data)
    record = read_run(copy)
    assert len(record.remarks) == 3 and record.clients is None
    text = make_page([record])
    assert "Line 4 of metrics.jsonl is damaged" in text
    assert "summary.json is damaged" in text and "Figures of single clients" in text


def test_folders_that_are_refused(copy: Path, tmp_path: Path) -> None:
    command("report", tmp_path / "none").refused("none is not a run directory")
    command("report", copy, "--out", tmp_path).refused(f"--out {tmp_path} is a folder")
    lost = tmp_path / "no" / "x.html"
    command("report", copy, "--out", lost).refused("there is no folder")
    command("report", copy, "--out", "/proc/x.html").refused("/proc/x.html cannot be written")
    (copy / "metrics.jsonl").write_text("{\n", encoding="utf-8")
    command("report", copy).refused("metrics.jsonl: line 1 is damaged")
    (copy / "metrics.jsonl").unlink()
    command("report", copy).refused("has no figures yet")
    assert not (copy / "report.html").exists()


def test_a_run_that_does_not_verify(copy: Path) -> None:
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    summary["state_digest"] = "0" * 64
    (copy / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    command("report", copy, "--verify").refused("The page is written", "does not verify")
    assert "Does not verify: summary.json has state_digest 000" in (copy / "report.html").read_text(
        encoding="utf-8"
    )


def test_the_folder_of_a_server(copy: Path) -> None:
    """It has neither a model nor examples, and its sites have names."""
    config = (copy / "config.toml").read_text(encoding="utf-8")
    config = re.sub(r"(?m)^path = .*", 'path = "at-sites"', config, count=1)
    from fedforward.config.fields import AT_SITES

    config = config.replace('"at-sites"', json.dumps(AT_SITES))
    (copy / "config.toml").write_text(config, encoding="utf-8")
    summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in summary.items() if k in ("method", "objective", "tune", "rounds",
            "local_steps", "stopped", "heldout_loss", "metrics", "seconds", "ledger_digest",
            "state_digest")}  # fmt: skip
    kept |= {
        "sites": {"museum": 7, "harbour": 9},
        "clients": 2,
        "message_bytes": {"up": 1, "down": 2},
    }
    (copy / "summary.json").write_text(json.dumps(kept), encoding="utf-8")
    text = make_page([read_run(copy)])
    assert "the sites&#39; own" in text and "museum" in text and "fedforward server" in text
    assert "answered before and after" not in text
    assert "Training loss of each site" in text
    assert "site 0" in Page(text).legends
    # What names the sites may be damaged in part.
    sites = [{"number": 0, "label": "<b>museum"}, {"number": None, "label": "x"}, 7]
    (copy / "status.json").write_text(json.dumps({"sites": sites}), encoding="utf-8")
    legends = Page(make_page([read_run(copy)])).legends
    assert "<b>museum" in legends and "site 1" in legends and "site 0" not in legends


def many_rounds(folder: Path, like: Path, rounds: int, clients: int) -> Path:
    """A run of many rounds, as its folder would have them."""
    folder.mkdir()
    config = (like / "config.toml").read_text(encoding="utf-8")
    config = re.sub(r"(?m)^rounds = \d+", f"rounds = {rounds}", config)
    (folder / "config.toml").write_text(config, encoding="utf-8")
    rng = np.random.default_rng(0)
    ledger = Ledger.create(folder / "ledger.sqlite", {"run": 1})
    ledger._database.execute("PRAGMA synchronous = OFF")
    lines = lines_of(like)[:1]
    for number in range(rounds):
        results = tuple(
            ClientResult(1 / clients, 0.1 / (1 + client), Report(
                number, client, 100, float(rng.random()), 0, rng.normal(size=8).astype(np.float32)
            ))
            for client in range(clients) if rng.random() < 0.8
        )  # fmt: skip
        part = Contribution(0, np.ones(1, np.float32))
        ledger.append(Round(Entry(number, (part,)), results))
        line = {"round": number + 1, "training_loss": float(rng.random()), "skipped_steps": 0}
        line |= {"learning_rates": {}, "seconds": float(number), "bytes": {"up": 9.0, "down": 9.0}}
        line |= {"heldout_loss": float(rng.random())} if number % 10 == 9 else {}
        lines.append(line)
    ledger.close()
    write_lines(folder, lines)
    return folder


def test_a_thousand_rounds(run: Path, tmp_path: Path) -> None:
    """In seconds of this process's own: other processes share the machine."""
    folder = many_rounds(tmp_path / "long", run, 1000, 20)
    began = time.process_time()
    text = make_page([read_run(folder)])
    assert time.process_time() - began < 5.0
    assert len(text) < 400_000
    assert "median of 20 clients" in text and "client 19" in text


def test_no_torch_is_needed(run: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from fedforward.reporting.page import make_page\n"
        "from fedforward.reporting.record import read_run\n"
        "assert 'Loss' in make_page([read_run(Path(sys.argv[1]))])\n"
        "assert 'torch' not in sys.modules\n"
    )
    line = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_too_many_runs_are_refused(run: Path) -> None:
    from fedforward.core.errors import FedForwardError

    with pytest.raises(FedForwardError, match=f"at most {MOST_RUNS} runs"):
        make_page([read_run(run)] * (MOST_RUNS + 1))


def test_words_of_a_picture_stay_as_they_are() -> None:
    words = '#010203 id="a" url(#b) $x$ <b>'
    chart = line_chart(words, [Series(words, [0, 1], [1, 2])], words, words)
    svg = named(chart.svg, "c1")
    assert svg.count('#010203 id="a" url(#b) $x$ &lt;b&gt;') == 2
    assert "var(--ink)" in svg or "var(--muted)" in svg


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it_without_overflow(
    copy: Path, run: Path, width: int, tmp_path: Path
) -> None:
    text = make_page([read_run(copy), read_run(run)])
    assert drawn(text, width, tmp_path) == WELL


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_browser_would_say_what_a_page_loads_and_where_it_is_too_wide(tmp_path: Path) -> None:
    found = drawn(
        "<img src='http://127.0.0.1:9/x.png'><div style='width:900px'>wide</div>", 390, tmp_path
    )
    assert re.match(r"beyond=\d{3} tall=false pictures=true loaded=http:.*x\.png$", found)


def test_the_demonstration_ends_with_the_path_of_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedforward.demo import run as demonstration

    whole = demonstration.prepare
    monkeypatch.setattr(demonstration, "prepare", lambda data: whole(data, rounds=1))
    page = tmp_path / "d" / "report.html"
    result = command("demo", "--out", tmp_path / "d")
    assert result.code == 0, result
    assert result.out.splitlines()[-1] == str(page)
    assert "Partition of the training examples" in page.read_text(encoding="utf-8")
