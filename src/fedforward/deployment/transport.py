"""What an engine must offer to the coordinator: identified sites, and letters to and from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Arrival:
    """What came back from a site: its sealed answer, or why there is none."""

    site: str
    data: bytes = b""
    error: str = ""


class Link(Protocol):
    """Carries sealed letters; knows nothing of what is in them."""

    def present(self) -> Sequence[str]:
        """The sites that can be reached now, by the names that the engine vouches for."""
        ...

    def send(self, site: str, data: bytes) -> None:
        """Hand over a letter; it is answered once or fails, each as one `Arrival`."""
        ...

    def receive(self) -> Sequence[Arrival]:
        """What has come since the last call; does not wait."""
        ...
