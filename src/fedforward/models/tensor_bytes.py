"""Tensors as bytes, as snapshots of a tuned state carry them."""

from collections.abc import Collection

import torch

from fedforward.core.errors import MessageError


def sizes(tensors: Collection[torch.Tensor]) -> list[int]:
    """Bytes of each tensor."""
    return [tensor.numel() * tensor.element_size() for tensor in tensors]


def to_bytes(tensors: Collection[torch.Tensor]) -> bytes:
    """The tensors' bytes one after the other, dtypes as they are."""
    return b"".join(
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for tensor in tensors
    )


def assign_bytes(tensors: Collection[torch.Tensor], data: bytes) -> None:
    """Set tensors from what `to_bytes` gave.

    Raises:
        MessageError: it is of another size.
    """
    if len(data) != sum(sizes(tensors)):
        raise MessageError(
            f"A tuned state of {len(data)} bytes was refused: this model's is "
            f"{sum(sizes(tensors))}."
        )
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    for tensor, part in zip(tensors, flat.split(sizes(tensors)), strict=True):
        tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
