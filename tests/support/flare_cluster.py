"""A `Cluster` whose engine is NVIDIA FLARE, with startup kits of its own."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedforward.deployment.nvflare import kits
from tests.support.cluster import Cluster


class FlareCluster(Cluster):
    """See the module; the kits are in `kits/`."""

    def __init__(self, folder: Path, sites: Sequence[str], **changes: Any) -> None:
        super().__init__(folder, sites, **changes)
        kits.make(folder / "kits", [f"localhost:{self.port}"], self.sites)

    def serve(self, *options: str) -> subprocess.Popen[bytes]:
        """See `Cluster`."""
        command = ["server", "run.toml", "--runtime", "nvflare", "--tls", "kits"]
        listen = ["--listen", f"0.0.0.0:{self.port}"]
        return self.start("server", *command, *listen, "--out", "out", *options)

    def join(
        self, name: str, *, kit: str = "", port: int | None = None, once: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start a site.

        Args:
            kit: another's folder.
            port: of a forwarder before the server, which the site's kit is then made to name.
        """
        kit = kit or f"kits/sites/{name}"
        if port is not None:
            file = self.folder / kit / "startup/fed_client.json"
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(f"localhost:{self.port}", f"localhost:{port}"))
        command = ["client", f"{name}.toml", "--runtime", "nvflare", "--tls", kit]
        server = ["--server", f"localhost:{port or self.port}"]
        return self.start(name, *command, *server, *(["--once"] if once else []))

    def begin(self, *, once: bool = True) -> None:
        """Start the server and all sites."""
        self.serve()
        for name in self.sites:
            self.join(name, once=once)
