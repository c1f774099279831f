"""How a run's examples are divided: what its report shows of the data and of the blocks.

`clients.json` lies in the run directory and nowhere else. It holds labels of the data, so it is
never part of a message. Imports no PyTorch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedforward.config.schema import Config
from fedforward.core.files import parse_json
from fedforward.data.corpus import Corpus
from fedforward.training.run_directory import write_json

FILE = "clients.json"
#: Labels of more examples are not counted: each is read for it.
MOST_COUNTED = 20_000
#: Labels that are kept; the rest count as one.
MOST_LABELS = 40
OTHERS = "(others)"


@dataclass(frozen=True)
class Divided:
    """What `clients.json` holds.

    Attributes:
        by: what the labels are, in words; empty where no labels are known.
        labels: of each client, how many examples have each label.
        blocks: names of the layout's blocks.
    """

    by: str
    labels: list[dict[str, int]]
    blocks: list[str]


def write_divided(folder: Path, config: Config, corpus: Corpus, blocks: Sequence[str]) -> None:
    """Write `clients.json` of a run."""
    by, counts = _labels(config, corpus)
    write_json(folder / FILE, asdict(Divided(by, _few(counts), list(blocks))))


def _labels(config: Config, corpus: Corpus) -> tuple[str, list[Mapping[str, int]]]:
    if corpus.groups:
        return f"{config.federation.field}", list(corpus.groups)
    labelled = config.data.label_words is not None or bool(corpus.classes)
    if not labelled or sum(map(len, corpus.clients)) > MOST_COUNTED:
        return "", []
    return "answer", [Counter(e.reference.strip() for e in part) for part in corpus.clients]


def _few(counts: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """The counts of the most frequent labels; those of the others together."""
    total: Counter[str] = Counter()
    for found in counts:
        total.update({str(label): number for label, number in found.items()})
    kept = [label for label, _ in total.most_common(MOST_LABELS)]
    result = []
    for found in counts:
        row = dict.fromkeys(kept, 0)
        for label, number in found.items():
            name = str(label) if str(label) in row else OTHERS
            row[name] = row.get(name, 0) + number
        result.append(row)
    return result


def read_divided(folder: Path) -> Divided | None:
    """What `clients.json` says; None where there is none, or it is not what a run writes."""
    try:
        content = parse_json((folder / FILE).read_bytes())
        found = Divided(**content)
    except (OSError, ValueError, TypeError):
        return None
    whole = isinstance(found.by, str) and isinstance(found.labels, list)
    whole = whole and isinstance(found.blocks, list)
    whole = whole and all(isinstance(name, str) for name in found.blocks)
    return found if whole and all(map(_are_counts, found.labels)) else None


def _are_counts(row: object) -> bool:
    return isinstance(row, dict) and all(type(n) is int and n >= 0 for n in row.values())
