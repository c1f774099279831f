"""Texts that are paths: told from hub names, made absolute, refused with the likely reason."""

import os
import sys
from pathlib import Path

import pytest

from fedforward.core.errors import FedForwardError
from fedforward.core.paths import (
    absolute_text,
    as_path,
    check_folder,
    check_new_folder,
    exists,
    is_path,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="names that Windows has not")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-0.6B", False),
        ("gpt2", False),
        ("(each site's own)", False),
        ("https://example.org/x.jsonl", False),
        ("hf://datasets/a/b/c.jsonl", False),
        ("./model", True),
        ("../model", True),
        ("~/model", True),
        ("/x", True),
        ("a/b/c", True),
        ("C:\\models\\tiny", True),
        ("C:/models", True),
        ("\\\\server\\share", True),
        ("models\\tiny", True),
        ("rows.jsonl", True),
        ("ROWS.CSV", True),
    ],
)
def test_paths_are_told_from_hub_names(text: str, expected: bool) -> None:
    assert is_path(text) is expected


def test_what_exists_is_a_path_whatever_it_looks_like(folder: Path) -> None:
    assert not is_path("org/name")
    (folder / "org/name").mkdir(parents=True)
    assert is_path("org/name") and absolute_text("org/name") == str(folder / "org/name")
    (folder / "shard1").touch()
    assert exists("shard*") and not exists("part*")


@posix
def test_paths_become_absolute_and_hub_names_do_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder / "me"))
    assert absolute_text("./a/../model") == str(folder / "model")
    assert absolute_text("~/model") == str(folder / "me/model")
    assert absolute_text("gpt2") == "gpt2"
    # On another system it means nothing, and stays as it was typed.
    assert absolute_text("C:\\models\\tiny") == "C:\\models\\tiny"


@posix
def test_a_way_through_a_link_leads_where_it_led(folder: Path) -> None:
    (folder / "deep/inner").mkdir(parents=True)
    (folder / "deep/model").mkdir()
    (folder / "link").symlink_to(folder / "deep/inner")
    # `link/..` is `deep`; what stands before `link` is another folder.
    assert Path(absolute_text("link/../model")).samefile(folder / "deep/model")


@posix
def test_a_folder_that_is_not_there_gets_its_likely_reason(folder: Path) -> None:
    (folder / "Model/inner").mkdir(parents=True)
    (folder / "weights.safetensors").touch()
    (folder / "dangling").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    for text, words in (
        ("weights.safetensors", "is a file"),
        ("Mod*", "is a pattern, and one folder is meant. It matches Mod"),
        ("./model", "no such folder. Did you mean 'Model'?"),
        ("Modle", "Did you mean 'Model'?"),
        ("./dangling", "It is a link that leads nowhere."),
        ("./loop", "It is a link that leads nowhere."),
        ("Model ", "without the spaces around it"),
        ("Model\\inner", "Did you mean 'Model/inner'?"),
        ("$HOME/x", "$HOME is not replaced"),
        ("%APPDATA%/x", "%APPDATA% is not replaced"),
        ("C:\\models", "a path of Windows"),
        ("~nobody-of-that-name/x", "no home folder for '~nobody-of-that-name'"),
        ("n" * 150, "no such folder. Give"),
        ("./gone", "no such folder. Give a folder."),
    ):
        with pytest.raises(FedForwardError) as caught:
            check_folder(text, "model.path", "a folder")
        message = str(caught.value)
        assert message.startswith(f"model.path = {text!r}") and words in message, message
    with pytest.raises(FedForwardError, match=r"^model.path = '.*…' cannot .*: File name too"):
        check_folder("n" * 5000, "model.path", "a folder")
    check_folder("Model", "model.path", "a folder")
    check_folder("./Model/../Model/", "model.path", "a folder")


@posix
def test_places_where_no_folder_is_made(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "dangling").symlink_to("nowhere")
    for text, words in (
        ("file", "is a file. Choose another --out"),
        ("runs/*", "is a pattern"),
        ("n" * 5000, "File name too long"),
        ("a\0b", "a NUL character"),
        ("a\nb", "a line break"),
        ("dangling", "is a link that leads nowhere. Choose another --out"),
        (os.fsdecode(b"b\xff"), "is no UTF-8 text. Choose another --out"),
    ):
        with pytest.raises(FedForwardError, match=r"^--out ") as caught:
            check_new_folder(Path(text), "--out")
        assert words in str(caught.value)
    (folder / "odd [name]? #1 %20 ü").mkdir()
    for text in ("odd [name]? #1 %20 ü", "new #2 %20 ü", "a/b/c", "file2 "):
        check_new_folder(Path(text), "--out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("C:\temp", r"holds a tab \(\\t\), which a backslash"),
        ("C:\new", r"holds a line break \(\\n\)"),
        ("C:\bin", r"control character '\\x08'"),
        ("a\0", "a NUL character"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("~nobody-of-that-name/x", "no home folder for '~nobody-of-that-name'"),
    ],
)
def test_texts_that_are_no_path(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        as_path(text)


@posix
def test_bytes_that_are_no_text_may_name_a_file(folder: Path) -> None:
    name = os.fsdecode(b"b\xff")
    (folder / name).mkdir()
    check_folder(name, "--model", "a folder")
    # A configuration is UTF-8, and cannot hold the name.
    with pytest.raises(ValueError, match="is no UTF-8 text"):
        as_path(name)
