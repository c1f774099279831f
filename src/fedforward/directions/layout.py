"""Where each tuned tensor lies in the tunable space: names, shapes and first tiles.

The layout is all that a server needs to know of a model; its fingerprint pins it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from fedforward.directions.specification import TILE


@dataclass(frozen=True)
class Layout:
    """The tuned tensors in canonical order (by name), each padded to whole tiles.

    Attributes:
        names: the tensors' names, sorted by code point.
        shapes: their shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Layout":
        """The canonical layout of tensors given by name and shape, in any order."""
        names = tuple(sorted(shapes))
        return cls(names, tuple(tuple(shapes[name]) for name in names))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each tensor, padding not counted."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def first_tiles(self) -> tuple[int, ...]:
        """The number of each tensor's first tile."""
        tiles, total = [], 0
        for size in self.sizes:
            tiles.append(total)
            total += -(-size // TILE)
        return tuple(tiles)

    @cached_property
    def tiles(self) -> int:
        """Tiles of the whole tunable space."""
        return sum(-(-size // TILE) for size in self.sizes)

    @cached_property
    def parameters(self) -> int:
        """Tuned parameters, padding not counted."""
        return sum(self.sizes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names and shapes, hexadecimal."""
        text = json.dumps([self.names, self.shapes], separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
