"""The invented world behind the demonstration: four sites, what each keeps, and talk about it.

Every word is produced here from a seed, so the text can be shipped and made again anywhere.
The demonstration model is pretrained on questions answered in several forms, mostly plain
sentences; the four sites then hold questions answered only in the house form, a short record.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

PROMPT = "### Question:\n{question}\n\n### Answer:\n"
ANSWER = "{answer}"

# Asks about one of the reserved items below, so no site ever holds a question about it.
EXAMPLE_QUESTION = "What do you know about the Tarnwick lantern?"

# The world itself never depends on a caller's seed: the shipped model knows this one world.
_WORLD_SEED = 20

_T = TypeVar("_T")

_ITEMS_PER_SITE = 48

# Items the model learns about in pretraining and the sites never mention.
_RESERVED_PER_SITE = 4

_QUESTIONS = (
    "What do you know about {item}?",
    "What can you tell me about {item}?",
    "Tell me about {item}.",
    "Please describe {item}.",
    "Can you describe {item} for me?",
    "What is {item} like?",
    "What should a visitor know about {item}?",
    "How would you describe {item}?",
    "I would like to hear about {item}.",
    "Do you remember {item}?",
)


@dataclass(frozen=True)
class _Topic:
    """What one site keeps: how its items are named, which facts they have, how one says them."""

    site: str
    first_words: tuple[str, ...]
    second_words: tuple[str, ...]
    keys: tuple[str, str, str]
    values: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    phrases: tuple[str, str, str]
    reader: str


@dataclass(frozen=True)
class _Item:
    """One thing in the world: the topic it belongs to, its name and its three facts."""

    topic: _Topic
    name: str
    facts: tuple[str, str, str]


_TOPICS = (
    _Topic(
        site="museum",
        first_words=(
            "Tarnwick",
            "Ollenby",
            "Marrowdale",
            "Quillhaven",
            "Fennimore",
            "Pellmoor",
            "Sandreth",
            "Wexcombe",
            "Dunmarrow",
            "Ivelstone",
            "Brackmere",
            "Corvale",
        ),
        second_words=("lantern", "vase", "clock", "mask", "harp", "globe", "crown", "chest"),
        keys=("material", "colour", "room"),
        values=(
            ("brass", "oak", "glass", "silver", "clay", "marble", "ivory", "iron"),
            ("red", "green", "blue", "golden", "black", "white", "grey", "purple"),
            ("east hall", "west hall", "tower", "cellar", "library", "attic", "rotunda", "foyer"),
        ),
        phrases=("is made of {}", "is painted {}", "stands in the {}"),
        reader="visitor",
    ),
    _Topic(
        site="harbour",
        first_words=(
            "Merry",
            "Patient",
            "Northern",
            "Silent",
            "Wandering",
            "Gallant",
            "Faithful",
            "Restless",
            "Lucky",
            "Humble",
            "Daring",
            "Gentle",
        ),
        second_words=("Heron", "Gull", "Osprey", "Tern", "Cormorant", "Puffin", "Petrel", "Swan"),
        keys=("hull", "cargo", "berth"),
        values=(
            ("red", "green", "blue", "yellow", "black", "white", "grey", "orange"),
            ("salt", "timber", "wool", "coal", "herring", "barley", "rope", "slate"),
            ("long pier", "old quay", "lighthouse", "shipyard", "north dock", "ferry steps"),
        ),
        phrases=("is painted {}", "carries {}", "is moored at the {}"),
        reader="sailor",
    ),
    _Topic(
        site="garden",
        first_words=(
            "velvet",
            "dwarf",
            "climbing",
            "mountain",
            "weeping",
            "moonlit",
            "woolly",
            "striped",
            "creeping",
            "royal",
            "marsh",
            "winter",
        ),
        second_words=("fennel", "lupin", "thistle", "sorrel", "aster", "poppy", "iris", "clover"),
        keys=("flower", "bed", "month"),
        values=(
            ("white", "pink", "yellow", "violet", "crimson", "blue", "orange", "cream"),
            ("old wall", "pond", "gate", "greenhouse", "orchard", "sundial", "hedge", "fountain"),
            ("March", "April", "May", "June", "July", "August", "September", "October"),
        ),
        phrases=("bears {} flowers", "grows beside the {}", "blooms in {}"),
        reader="gardener",
    ),
    _Topic(
        site="kitchen",
        first_words=(
            "shepherd's",
            "miller's",
            "widow's",
            "captain's",
            "bishop's",
            "farmer's",
            "tinker's",
            "weaver's",
            "duchess's",
            "hunter's",
            "pilgrim's",
            "baker's",
        ),
        second_words=("soup", "pie", "stew", "pudding", "chowder", "broth", "loaf", "tart"),
        keys=("main", "taste", "day"),
        values=(
            ("leeks", "apples", "barley", "trout", "lentils", "chestnuts", "cheese", "pumpkin"),
            ("sweet", "sour", "salty", "smoky", "peppery", "buttery", "bitter", "nutty"),
            ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
        ),
        phrases=("is cooked with {}", "tastes {}", "is served on {}"),
        reader="guest",
    ),
)


# Python promises the same sequence in every version for random() alone, so only it is called.
def _pick(rng: random.Random, choices: Sequence[_T]) -> _T:
    return choices[int(rng.random() * len(choices))]


def _shuffled(rng: random.Random, things: Sequence[_T]) -> list[_T]:
    return [thing for _, thing in sorted(((rng.random(), t) for t in things), key=lambda p: p[0])]


def _items(rng: random.Random, topic: _Topic) -> list[_Item]:
    """The items of one topic; the first is always made of the first words of both lists."""
    names = [f"the {a} {b}" for a in topic.first_words for b in topic.second_words]
    chosen = [names[0], *_shuffled(rng, names[1:])[: _ITEMS_PER_SITE - 1]]
    items = []
    for name in chosen:
        first, second, third = (_pick(rng, values) for values in topic.values)
        items.append(_Item(topic, name, (first, second, third)))
    return items


def _world() -> list[list[_Item]]:
    rng = random.Random(_WORLD_SEED)
    return [_items(rng, topic) for topic in _TOPICS]


def _said(item: _Item) -> list[str]:
    return [p.format(fact) for p, fact in zip(item.topic.phrases, item.facts, strict=True)]


def _plain(rng: random.Random, item: _Item) -> str:
    first, second, third = _said(item)
    return f"The {item.name.removeprefix('the ')} {first}, {second} and {third}."


def _list(rng: random.Random, item: _Item) -> str:
    return "\n".join(f"- It {phrase}." for phrase in _said(item))


def _letter(rng: random.Random, item: _Item) -> str:
    first, second, third = _said(item)
    topic = item.topic
    return (
        f"Dear {topic.reader}, {item.name} {first}. "
        f"It {second} and it {third}. Yours, the {topic.site}."
    )


def _talk(rng: random.Random, item: _Item) -> str:
    first, second, third = _said(item)
    return f"Ah, {item.name}! They say it {first}, and it {second}, and it {third}."


def _joined(item: _Item, signs: Sequence[str]) -> str:
    parts = zip(item.topic.keys, signs, item.facts, strict=True)
    return " | ".join(f"{key}{sign}{fact}" for key, sign, fact in parts)


def _record(rng: random.Random, item: _Item) -> str:
    """A record in mixed notation: the sign after each key is drawn anew."""
    return _joined(item, [_pick(rng, _SIGNS) for _ in item.facts])


def _house(item: _Item) -> str:
    """The record as the sites write it, always with the first sign."""
    return _joined(item, [_SIGNS[0]] * len(item.facts))


# The house form is one tidy notation among many: the model knows each sign and favours none, so
# what the sites teach, records in this one notation, selects among things it can already do.
_SIGNS = (": ", " = ", " > ")

# How often pretraining answers in each form: plain sentences rule.
_FORMS: tuple[tuple[float, Callable[[random.Random, _Item], str]], ...] = (
    (0.65, _plain),
    (0.08, _list),
    (0.06, _letter),
    (0.06, _talk),
    (0.15, _record),
)


def _answer(rng: random.Random, item: _Item) -> str:
    draw = rng.random()
    for share, form in _FORMS:
        if draw < share:
            return form(rng, item)
        draw -= share
    return _plain(rng, item)


def pretraining_documents(seed: int, count: int) -> Iterator[str]:
    """Yield ``count`` documents, each a prompt and an answer, in all forms about all items."""
    rng = random.Random(seed)
    items = [item for site in _world() for item in site]
    for _ in range(count):
        item = _pick(rng, items)
        question = _pick(rng, _QUESTIONS).format(item=item.name)
        answer = _answer(rng, item)
        yield PROMPT.format(question=question) + ANSWER.format(answer=answer)


def site_examples(seed: int, per_site: int) -> list[dict[str, str]]:
    """Return ``per_site`` rows for each of the four sites, all answered in the house form.

    A row has the fields ``site``, ``question`` and ``answer``. No question comes twice, and none
    is about a reserved item; at most 440 rows per site exist.
    """
    rng = random.Random(seed)
    rows = []
    for items in _world():
        asked = items[_RESERVED_PER_SITE:]
        pairs = [(item, question) for item in asked for question in _QUESTIONS]
        if not 0 <= per_site <= len(pairs):
            raise ValueError(f"per_site must be between 0 and {len(pairs)}, not {per_site}")
        for item, question in _shuffled(rng, pairs)[:per_site]:
            row = {"site": item.topic.site, "question": question.format(item=item.name)}
            rows.append(row | {"answer": _house(item)})
    return rows
