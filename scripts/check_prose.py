"""List sentences and lines of Markdown files that are too long.

    python scripts/check_prose.py [FILE …]

Without arguments it reads README.md, CHANGELOG.md, CONTRIBUTING.md and everything below docs/.
Code blocks and tables are left out. A link counts as its text, inline code as one word.
Exit code 1 if anything was listed.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_WORDS = 25
MAX_CHARACTERS = 100
FENCE = re.compile(r"^\s*(```|~~~)")
LIST_ITEM = re.compile(r"^\s*([-*+]|\d+\.)\s+")
#: Lines that are no prose: a table, a heading's rule, an image alone, HTML, a link's definition.
NO_PROSE = re.compile(r"^\s*(\||<|:::|!!!|\[[^\]]+\]: |\[?!\[|---+$)")
#: Full stops that end no sentence.
ABBREVIATION = re.compile(r"\b(e\.g|i\.e|et al|vs|cf|Fig|No)\.")


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Each paragraph, heading or list item of the text with the number of its first line."""
    start, collected = 0, ""
    in_fence = in_list = False
    blank = True
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        indented_code = line.startswith("    ") and blank and not in_list
        if fence:
            in_fence = not in_fence
        is_prose = not (fence or in_fence or NO_PROSE.match(line))
        begins = not line.strip() or line.startswith("#") or LIST_ITEM.match(line)
        if not is_prose or begins or indented_code:
            if collected:
                yield start, collected
            collected = ""
        if indented_code:
            continue
        if is_prose and line.strip():
            in_list = bool(LIST_ITEM.match(line)) or (in_list and line.startswith(" "))
            start = start if collected else number
            collected += " " + LIST_ITEM.sub("", line).strip("# ")
        if line.startswith("#"):
            yield start, collected
            collected = ""
        blank = not line.strip()
    if collected:
        yield start, collected


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; a link is its text and inline code is one word."""
    plain = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", paragraph)
    plain = re.sub(r"``[^`]+``|`[^`]+`", "CODE", plain)
    plain = ABBREVIATION.sub(r"\1", plain)
    return [part for part in re.split(r"(?<=[.!?])[*_)\"']*\s+", plain) if part.strip()]


def words(sentence: str) -> int:
    """How many words a sentence has; a number counts, a lone sign does not."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def complaints(text: str) -> Iterator[tuple[int, str]]:
    """Line number and sentence for everything that is too long."""
    for start, paragraph in paragraphs(text):
        for sentence in sentences(paragraph):
            if (count := words(sentence)) > MAX_WORDS:
                yield start, f"{count} words: {sentence.strip()}"
    in_fence = False
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        in_fence = in_fence != bool(fence)
        prose = not (in_fence or NO_PROSE.match(line) or line.startswith("    "))
        if prose and len(line) > MAX_CHARACTERS:
            yield number, f"{len(line)} characters: {line[:60].strip()} …"


def documents() -> list[Path]:
    """The Markdown files that are read without arguments."""
    named = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    return [path for path in named if path.is_file()] + sorted((ROOT / "docs").rglob("*.md"))


def main() -> int:
    paths = [Path(name) for name in sys.argv[1:]] or documents()
    found = 0
    for path in paths:
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        for number, complaint in sorted(complaints(path.read_text(encoding="utf-8"))):
            print(f"{shown}:{number}: {complaint}")
            found += 1
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
