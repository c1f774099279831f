"""NVIDIA FLARE as an engine that carries messages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedforward.config.schema import Config
from fedforward.config.site import SiteConfig
from fedforward.deployment.runtime import require
from fedforward.training.metrics import ProgressCallback


class FlareRuntime:
    """FLARE as a `Runtime`; FLARE itself is imported by what needs it."""

    def check(self) -> None:
        """See `Runtime`."""
        require("nvflare", "NVIDIA FLARE", "nvflare")

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
        """See `Runtime`; `tls` is the folder of FLARE's startup kits."""
        self.check()
        from fedforward.deployment import supervisor
        from fedforward.deployment.nvflare import server

        kits, port = server.check(tls, insecure, listen)
        supervisor.end_on_sigterm()
        return server.serve(
            config, out, kits, port, resume=resume, progress=progress, without=without
        )

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
        """See `Runtime`; `tls` is the site's startup kit."""
        self.check()
        from fedforward.deployment import supervisor
        from fedforward.deployment.nvflare import client

        kit = client.check(tls, key, insecure, server)
        supervisor.end_on_sigterm()
        client.take_part(path, settings, kit, once=once)


RUNTIME = FlareRuntime()
