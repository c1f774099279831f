"""Where each tuned tensor lies in the tunable space: names, shapes and first tiles.

The layout is all that a server needs to know of a model; its fingerprint pins it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

#: Coordinates per tile. A tuned tensor is padded to a whole number of tiles.
TILE = 2048


@dataclass(frozen=True)
class Layout:
    """The tuned tensors in canonical order (by name), each padded to whole tiles.

    Attributes:
        names: the tensors' names, sorted by code point.
        shapes: their shapes, in the same order.
        blocks: names of the blocks that the tensors are divided among, in the order of the forward
            pass, such as "embeddings", "0", "1", "norm".
        owners: the place in `blocks` of each tensor's block.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    blocks: tuple[str, ...]
    owners: tuple[int, ...]

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        blocks: Mapping[str, Sequence[str]] | None = None,
    ) -> "Layout":
        """The canonical layout of tensors given by name and shape, in any order.

        Args:
            blocks: the names of each block's tensors, blocks in the order of the forward pass; None
                is a single block.
        """
        names = tuple(sorted(shapes))
        blocks = {"all": names} if blocks is None else blocks
        owner = {name: place for place, own in enumerate(blocks.values()) for name in own}
        return cls(
            names,
            tuple(tuple(shapes[name]) for name in names),
            tuple(blocks),
            tuple(owner[name] for name in names),
        )

    def check(self) -> None:
        """Make sure that what another party calls its layout is one.

        Raises:
            ValueError: it has no tensors, is not in canonical order, or its parts do not fit.
        """
        counts = {len(self.names), len(self.shapes), len(self.owners)}
        if len(counts) > 1 or not self.names or list(self.names) != sorted(set(self.names)):
            raise ValueError("a layout without canonical names")
        if max(self.owners) >= len(self.blocks) or not all(self.sizes):
            raise ValueError("a layout with empty tensors or unknown blocks")

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
    def block_sizes(self) -> tuple[int, ...]:
        """Tuned parameters of each block."""
        sizes = [0] * len(self.blocks)
        for owner, size in zip(self.owners, self.sizes, strict=True):
            sizes[owner] += size
        return tuple(sizes)

    @cached_property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """Stretches of tiles that belong to one block: (block, first tile, end), in order."""
        found: list[tuple[int, int, int]] = []
        ends = (*self.first_tiles[1:], self.tiles)
        for owner, begin, end in zip(self.owners, self.first_tiles, ends, strict=True):
            if found and found[-1][0] == owner:
                begin = found.pop()[1]
            found.append((owner, begin, end))
        return tuple(found)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and blocks, hexadecimal."""
        content = [self.names, self.shapes, self.blocks, self.owners]
        text = json.dumps(content, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
