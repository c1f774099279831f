"""Directions z(seed): pure functions of seed and coordinate, generated where they are consumed.

`ops` holds the operations that models use, and picks the implementation by the tensor's
device. `Layout` numbers the coordinates of a model's tuned tensors. `docs/directions.md` specifies
every bit. Nothing here knows of models, rounds or clients, and this face imports no PyTorch, so
that a server without it can work with layouts and directions.
"""

from fedforward.core.layout import Layout
from fedforward.directions.spec import TILE, VERSION, Distribution, Stream

__all__ = ["TILE", "VERSION", "Distribution", "Layout", "Stream"]
