"""Configuration files that are no TOML, and the lines that errors name."""

import os
import threading
from pathlib import Path

import pytest

from fedforward.config import toml_text
from fedforward.config.loading import load, parse_override
from fedforward.core.errors import FedForwardError

GOOD = '[model]\npath = "m"\n\n[data]\nsource = "d.jsonl"\n'


def refusal(path: Path, raw: bytes | str, *overrides: str) -> str:
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    with pytest.raises(FedForwardError) as caught:
        load(path, overrides)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c.toml"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (GOOD.encode("utf-16"), "it is UTF-16 text. Save it as UTF-8"),
        (GOOD.encode("utf-16-le"), "it is UTF-16 text"),
        (GOOD.replace("m", "ü").encode("latin-1"), "line 1 is not UTF-8 text (the byte 0xfc)"),
        ('[model]\npath = "C:\\Users\\me"', 'line 2, `path = "C:\\Users\\me"`: a backslash in'),
        ('[model]\npath = "D:\\models"', "Write a path in single quotes"),
        ("[model]\npath = ./m", "line 2, `path = ./m`: invalid value. Text needs straight quotes"),
        ("[model]\npath = “m”", "Text needs straight quotes"),
        ("[run]\nx = True", "true and false are written small"),
        ('[model]\npath = "m', 'line 2, `path = "m`: a text that begins with a quote does not end'),
        ("[run]\nseed: 3", "line 2, `seed: 3`: expected '=' after a key"),
        ("[run]\nseed = 1\nseed = 2", "line 3 says run.seed again, after line 2. Leave one"),
        ("[run]\n\n[model]\n[run]\n", "line 4 says run again, after line 1"),
        ("[run]\nseed = 1\n'seed' = 2", "line 3 says run.seed again, after line 2"),
        ("run.seed = 1\n[run]\nthreads = 1", "line 2: a key or a section is there twice"),
        ("x = {a = 1, a = 2}", "line 1: a key or a section is there twice"),
        ('{"model": {}}', 'line 1, `{"model": {}}`: invalid statement'),
        ("a=" + "[" * 5000, "it is nested too deeply"),
    ],
)
def test_what_is_no_toml_is_a_sentence_with_its_line(
    path: Path, raw: bytes | str, words: str
) -> None:
    message = refusal(path, raw)
    assert message.startswith(f"{path} is not valid TOML: ") and words in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "\n[run]\nsed = 3", "line 8: run.sed is not a known key. Did you mean run.seed?"),
        (GOOD + "[method]\nmu = -1", "line 7: method.mu = -1 is not allowed"),
        (
            GOOD + "method.mu = -1.0",
            "line 6: data.method is not a known key. [method] is a section",
        ),
        ("run.seed = -1\n" + GOOD, "line 1: run.seed = -1 is not allowed"),
        (
            GOOD + "[run]\ntext = '''\nseed = -1\n'''\nseed = -2",
            "line 10: run.seed = -2 is not allowed",
        ),
        (
            GOOD + "[method]\nlearning_rate = 1.0\nrate_spread = 2.0",
            "line 6: method: rate_spread = 2.0",
        ),
        ('path = "x"\n' + GOOD, "There is model.path: write it below [model]."),
        (GOOD + "rounds = 3", "line 6: data.rounds is not a known key. There is federation.rounds"),
        (GOOD + "[data.model]\npath = 'x'", "[model] is a section of its own: write [model]"),
        (GOOD.replace("[model]", "[Model]"), "line 1: Model is not a known section. Did you mean"),
        (GOOD.replace("path", "PATH"), "line 2: model.PATH is not a known key. Did you mean model"),
        (GOOD.replace("[model]", "[[model]]"), "must be a section, written [model]"),
        (GOOD.replace('"m"', '"C:\\temp"'), "line 2: model.path: 'C:\\temp' holds a tab"),
        (GOOD.replace("d.jsonl", "\\new.jsonl"), "line 5: data.source: '\\new.jsonl' holds a line"),
        (GOOD.replace('"m"', '"m\\u0000"'), "model.path: 'm\\x00' holds a NUL character"),
        (GOOD.replace('"m"', '""'), "line 2: model.path: '' is empty; write a path"),
    ],
)
def test_what_is_wrong_with_a_key_names_its_line(path: Path, text: str, words: str) -> None:
    message = refusal(path, text)
    assert message.startswith(f"{path}:") and words in message, message


def test_a_key_of_the_command_line_is_said_to_be_one(path: Path) -> None:
    message = refusal(path, GOOD + "[method]\nmu = 1.0", "method.mu=-1", "run.sed=3")
    assert "on the command line: method.mu = -1 is not allowed" in message
    assert "on the command line: run.sed is not a known key" in message


def test_lines_end_as_they_do_on_any_system(path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        path.write_bytes(GOOD.replace("\n", end).encode("utf-8-sig"))
        assert load(path).data.source == "d.jsonl"
        assert "line 8: run.sed" in refusal(path, (GOOD + "\n[run]\nsed = 3").replace("\n", end))


def test_what_is_no_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(FedForwardError) as caught:
            load(path)
        return str(caught.value)

    assert "no such configuration file" in refused(tmp_path / "none.toml")
    assert f"{tmp_path} is a folder, and no configuration file. Give a TOML" in refused(tmp_path)
    (tmp_path / "c.toml").write_text(GOOD, encoding="utf-8")
    assert "Give one of its files: c.toml." in refused(tmp_path)
    assert "File name too long" in refused(tmp_path / ("n" * 5000))
    monkeypatch.setattr(toml_text, "MAX_BYTES", 10)
    assert "a configuration is of at most 10 B" in refused(tmp_path / "c.toml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    caught: list[str] = []

    def read() -> None:
        try:
            load(tmp_path / "pipe")
        except FedForwardError as error:
            caught.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert caught and "is a device or a pipe" in caught[0]


def test_an_override_with_backslashes(path: Path) -> None:
    assert parse_override(r"model.path=C:\temp\new") == ("model", "path", r"C:\temp\new")
    assert parse_override(r"model.path='C:\temp'") == ("model", "path", r"C:\temp")
    with pytest.raises(FedForwardError, match="backslash in double quotes begins an escape"):
        parse_override(r'model.path="C:\models"')
    message = refusal(path, GOOD, r'model.path="C:\temp"')
    assert "on the command line: model.path: 'C:\\temp' holds a tab" in message
