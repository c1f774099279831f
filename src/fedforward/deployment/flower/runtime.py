"""Flower as an engine that carries messages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig
from fedforward.deployment.runtime import require
from fedforward.training.metrics import ProgressCallback


class FlowerRuntime:
    """Flower as a `Runtime`; Flower itself is imported by what needs it."""

    def check(self) -> None:
        """See `Runtime`."""
        require("flwr", "Flower", "flower")

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
        """See `Runtime`."""
        self.check()
        from fedforward.deployment import supervisor
        from fedforward.deployment.flower import server

        address = server.ListenAddress.parse(listen, tls, insecure)
        supervisor.end_on_sigterm()
        return server.serve(config, out, address, resume=resume, progress=progress, without=without)

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
        """See `Runtime`."""
        self.check()
        from fedforward.deployment import supervisor
        from fedforward.deployment.flower import client

        client.check(tls, key, insecure)
        supervisor.end_on_sigterm()
        client.take_part(path, settings, server, tls=tls, key=key, once=once)


RUNTIME = FlowerRuntime()
