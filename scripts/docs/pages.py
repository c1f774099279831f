"""The generated pages by name: configuration keys, commands, API, wire form, errors.

`generated` is what the site and its test share; it needs no mkdocs.
"""

import re
from pathlib import Path

import api
import commands
import configuration
import error_sentences
import wire


def generated(root: Path) -> dict[str, str]:
    """Every generated page, by its path below `docs/`.

    Args:
        root: of the repository.
    """
    return {
        "reference/configuration.md": configuration.page(),
        "reference/commands.md": commands.page(),
        "reference/api.md": api.page(),
        "reference/wire.md": wire.page(),
        "reference/errors.md": error_sentences.page(root / "src/fedforward"),
        "how-to/method-example.md": method_example(root),
        "changelog.md": _from_root(root, "CHANGELOG.md"),
        "contributing.md": _from_root(root, "CONTRIBUTING.md"),
    }


def method_example(root: Path) -> str:
    """A whole method as it stands in the tree, and the example package that adds one."""
    shown = ["src/fedforward/methods/decomfl.py"]
    plugin = root / "examples/plugin"
    shown += [
        str(path.relative_to(root))
        for path in sorted(plugin.rglob("*"))
        if path.suffix in (".py", ".toml", ".md") and path.is_file()
    ]
    parts = [
        "# A method in full\n",
        "These files are shown as they stand in the repository. "
        "[Your own method](own-method.md) explains the parts.\n",
    ]
    for name in shown:
        language = {".py": "python", ".toml": "toml", ".md": "markdown"}[Path(name).suffix]
        body = (root / name).read_text(encoding="utf-8")
        parts.append(f"## `{name}`\n\n~~~~{language}\n{body.rstrip()}\n~~~~\n")
    return "\n".join(parts)


def _from_root(root: Path, name: str) -> str:
    """A document of the repository's root, its links made relative to `docs/`."""
    text = (root / name).read_text(encoding="utf-8")
    return re.sub(r"\]\(docs/", "](", text)
