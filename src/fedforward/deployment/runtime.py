"""What an engine that carries messages offers to the commands: the seam of the runtimes.

An engine is one package under `deployment/`, or of its own with an entry point of the group
`fedforward.runtimes`. It starts processes and moves bytes; rounds are the coordinator's.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig
from fedforward.core.errors import FedForwardError
from fedforward.training.metrics import ProgressCallback


class Runtime(Protocol):
    """An engine, as `fedforward server` and `fedforward client` use it."""

    def check(self) -> None:
        """Refuse a system or an installation that the engine cannot use.

        Raises:
            FedForwardError: with what to install, or where to run it.
        """
        ...

    def serve(
        self,
        config: Config,
        out: Path,
        *,
        listen: str,
        tls: Path | None,
        insecure: bool,
        resume: bool,
        progress: ProgressCallback | None,
        without: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Carry out a run with whatever sites come; returns its summary.

        Args:
            without: names of sites that a run leaves out that goes on.
        """
        ...

    def take_part(
        self,
        path: Path,
        settings: SiteConfig,
        server: str,
        *,
        tls: Path | None,
        key: Path | None,
        insecure: bool,
        once: bool,
    ) -> None:
        """Take part in a server's runs with this site's data and model, until interrupted."""
        ...


def require(package: str, engine: str, extra: str) -> None:
    """Refuse a system without Unix sockets, or an installation without an engine's package.

    Args:
        package: as it is imported.
        engine: its name for people.
        extra: of fedforward, which installs it.

    Raises:
        FedForwardError: with what to install, or where to run it.
    """
    if sys.platform == "win32":
        raise FedForwardError(
            "Federations across machines need Unix sockets and process groups, which Windows "
            "lacks. Use Linux or macOS, or WSL on this machine; `fedforward run` works here."
        )
    if find_spec(package) is None:
        raise FedForwardError(
            f"Federations across machines run on {engine}, which is not installed. Install it "
            f"with: pip install 'fedforward[{extra}]'"
        )
