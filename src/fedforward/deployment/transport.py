"""What an engine must offer to the coordinator: identified sites, and messages to and from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reply:
    """What came back from a site: its envelope, or why there is none."""

    site: str
    data: bytes = b""
    error: str = ""


class Transport(Protocol):
    """Carries envelopes; knows nothing of what is in them."""

    def present(self) -> Sequence[str]:
        """The sites that can be reached now, by the names that the engine vouches for."""
        ...

    def send(self, site: str, data: bytes) -> None:
        """Hand over an envelope; it is answered once or fails, each as one `Reply`."""
        ...

    def receive(self) -> Sequence[Reply]:
        """What has come since the last call; does not wait."""
        ...
