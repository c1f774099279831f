"""Paths as people write them: which texts are paths, where they lie, what is wrong with them.

A relative path is relative to the folder that the command is started in. Imports nothing of the
package but its errors.
"""

import difflib
import glob
import os
import re
import sys
from pathlib import Path

from fedforward.core.errors import FedForwardError

#: Endings of what is a file even where no such file exists.
_TEXTS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".txt")
_ENDINGS = (*_TEXTS, ".parquet", ".arrow", ".feather", ".gz", ".zst", ".gguf", ".safetensors")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_VARIABLE = re.compile(r"\$\w+|\$\{\w+\}|%\w+%")
#: Characters of a path that an error shows.
_SHOWN = 200
_CONTROLS = {"\t": "a tab (\\t)", "\n": "a line break (\\n)", "\0": "a NUL character"}


def as_path(text: str) -> str:
    """A text of a configuration that is a path or a hub name, as it is.

    Raises:
        ValueError: no path is like that; the message begins with the text.
    """
    if not text.strip():
        raise ValueError(f"{text!r} is empty; write a path")
    if found := _control(text):
        raise ValueError(
            f"{text!r} holds {found}, which a backslash in double quotes may have made; write the "
            "path in single quotes, or with forward slashes"
        )
    if text.startswith("~") and str(home(text)) == text:
        raise ValueError(f"{text!r}: there is no home folder for {text.split('/')[0]!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{text!r} is no UTF-8 text; give it another name") from error
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{text!r} cannot be a file name here: the system's encoding is "
            f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1, or LC_ALL=C.UTF-8"
        ) from error
    return text


def _control(text: str) -> str:
    """The first control character of a text, in words; empty if there is none."""
    for character in text:
        if ord(character) < 32 or ord(character) == 127:
            return _CONTROLS.get(character, f"the control character {character!r}")
    return ""


def is_path(text: str) -> bool:
    """Whether a text is a path and no hub name; one that exists here always is a path."""
    if "://" in text:
        return False
    if text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1:
        return True
    if _WINDOWS.match(text) or text.lower().endswith(_ENDINGS):
        return True
    return exists(text)


def exists(text: str) -> bool:
    """Whether a file, a folder or what a pattern names is here; False for impossible names."""
    try:
        return home(text).exists() or bool(matches(text))
    except (OSError, ValueError):
        return False


def matches(pattern: str) -> list[str]:
    """What a pattern such as "shards/*.jsonl" names here, sorted; nothing for other texts."""
    if not glob.has_magic(pattern):
        return []
    # `Path.glob` takes no absolute pattern.
    return sorted(glob.glob(str(home(pattern)), recursive=True))  # noqa: PTH207


def absolute_text(text: str) -> str:
    """A path made absolute, its links left as they are; hub names and others' paths unchanged."""
    if not is_path(text) or (_WINDOWS.match(text) and sys.platform != "win32"):
        return text
    path = home(text).absolute()
    # What is behind a link may have another parent than the link.
    plain = Path(os.path.normpath(path))
    try:
        return str(plain if plain.samefile(path) else path)
    except (OSError, ValueError):
        return str(path if path.exists() else plain)


def home(text: str | Path) -> Path:
    """The path of a text, "~" replaced where there is such a home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def check_folder(text: str, key: str, what: str) -> None:
    """Refuse a path that is not that of a folder, with the likely reason.

    Args:
        text: as the user typed it.
        key: that names it in errors, such as "model.path" or "--out".
        what: should be there, as in "a folder with config.json".

    Raises:
        FedForwardError: there is no such folder.
    """
    path = home(text)
    given = f"{key} = {_cut(text)!r}"
    try:
        if path.is_dir():
            return
        found = path.exists()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FedForwardError(f"{given} cannot be looked at: {reason}. Give {what}.") from error
    if found:
        raise FedForwardError(
            f"{given} is a file. Give {what}; the file lies in the folder {str(path.parent)!r}."
        )
    if glob.has_magic(text):
        found_now = matches(text)
        here = f" It matches {', '.join(found_now[:3])}." if found_now else ""
        raise FedForwardError(f"{given} is a pattern, and one folder is meant.{here} Give {what}.")
    raise FedForwardError(f"{given}: no such folder.{hint(text)} Give {what}.")


def check_new_folder(path: Path, key: str) -> None:
    """Refuse a place where no folder can be or is meant to be made.

    Raises:
        FedForwardError: a file or a pattern, or a name that the system does not take.
    """
    text = str(path)
    if control := _control(text):
        raise FedForwardError(f"{key} {text!r} holds {control}. Choose another {key}.")
    try:
        text.encode("utf-8", "surrogateescape").decode("utf-8")
        found = path.is_dir(), os.path.lexists(path)
    except UnicodeError as error:
        raise FedForwardError(f"{key} {text!r} is no UTF-8 text. Choose another {key}.") from error
    except OSError as error:
        raise FedForwardError(
            f"{key} {_cut(text)}: {error.strerror}. Choose another {key}."
        ) from error
    if found == (False, True) and not path.exists():
        raise FedForwardError(f"{key} {text} is a link that leads nowhere. Choose another {key}.")
    if found == (False, True):
        raise FedForwardError(f"{key} {text} is a file. Choose another {key}, a folder.")
    if not found[0] and any(sign in text for sign in "*?"):
        raise FedForwardError(
            f"{key} {text} is a pattern, and one folder is meant. Choose another {key}."
        )


def _cut(text: str) -> str:
    """A text as long as a person reads."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def hint(text: str) -> str:
    """Why a path may lead nowhere, as a sentence after a space; empty where nothing is known."""
    if (found := _VARIABLE.search(text)) and not os.path.lexists(text):
        return f" {found.group()} is not replaced by the environment's variable; write it out."
    if _WINDOWS.match(text) and sys.platform != "win32":
        return " It is a path of Windows, and this is another system; WSL has C: as /mnt/c."
    if text.startswith("~") and str(home(text)) == text:
        return f" There is no home folder for {text.split('/')[0]!r}."
    path = home(text)
    if path.is_symlink():
        return " It is a link that leads nowhere."
    if text != text.strip() and exists(text.strip()):
        return " There is one without the spaces around it."
    if exists(slashes := text.replace("\\", "/")):
        return f" Did you mean {slashes!r}?"
    try:
        names = [other.name for other in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    near = [name for name in names if name.lower() == path.name.lower()]
    near = near or difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""
