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

    def join_flare(
        self, name: str, *options: str, kit: str = "", once: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start a site; `kit` is another's folder."""
        command = ["client", f"{name}.toml", "--runtime", "nvflare"]
        command += ["--server", f"localhost:{self.port}", "--tls", kit or f"kits/sites/{name}"]
        return self.start(name, *command, *options, *(["--once"] if once else []))

    def begin(self, *, once: bool = True) -> None:
        """Start the server and all sites."""
        self.serve()
        for name in self.sites:
            self.join_flare(name, once=once)
