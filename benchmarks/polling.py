"""What idle sites cost a server: CPU seconds of the engine and of the reverse proxy, and bytes.

    python benchmarks/polling.py [--sites 8] [--seconds 60] [--no-hold] [--json]

Flower's SuperLink, our reverse proxy with TLS, and SuperNodes with keys on the loopback device,
without any run: a site's question for a message is held for 20 s, and it asks again 3 s later. With
`--no-hold` the engine answers at once, as it does by itself. CPU seconds are
the processes' own (`/proc/PID/stat`), less those of the same time before there were sites; `sites
a core` is how many would keep one core busy.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import httpx

from fedforward.deployment.flower import certificates, engine
from fedforward.deployment.flower.held_pulls import HeldPulls
from fedforward.deployment.flower.notices import ANSWERED, SENT, Notices
from fedforward.deployment.flower.reverse_proxy import ReverseProxy
from fedforward.deployment.flower.site_auth import read_public_key
from fedforward.deployment.flower.timings import Timings
from fedforward.deployment.supervisor import Child, Supervisor, free_port


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, sites: int, seconds: float, hold: bool) -> dict[str, float]:
    """See the module."""
    names = [f"site-{number}" for number in range(sites)]
    outer, inner, home = folder / "outer", folder / "inner", folder / "home"
    certificates.make(outer, ["localhost"], names)
    certificates.make(inner, ["127.0.0.1"], [])
    home.mkdir()
    secret = folder / "secret"
    secret.write_bytes(os.urandom(32))
    port, outside = free_port(), free_port()
    trust = certificates.trust(inner)
    pair = (str(outer / "server.crt"), str(outer / "server.key"))
    read = [read_public_key((outer / "sites" / f"{name}.pub").read_bytes()) for name in names]
    keys = dict(key for key in read if key is not None)
    notices = [Notices(home / name) for name in (SENT, ANSWERED)]
    for notice in notices:
        notice.create()
    held = HeldPulls(*notices, Timings(None)) if hold else None
    url = f"https://127.0.0.1:{port}"
    proxy = ReverseProxy("127.0.0.1", outside, url, trust, pair, keys, held)
    environment = engine.environment(home)
    with Supervisor() as supervisor:
        command = engine.superlink(port, folder / "database", secret, inner)
        link = supervisor.start(Child("superlink", command, folder / "link.log", environment))
        while True:
            try:
                httpx.get(f"https://127.0.0.1:{port}/health", verify=trust, trust_env=False)
                break
            except httpx.HTTPError:
                assert link.running, link.tail()
                time.sleep(0.2)
        flower = engine.CommandLine(home, f"127.0.0.1:{port}", inner / "ca.crt")
        flower.register({name: outer / "sites" / f"{name}.pub" for name in names})
        proxy.open()
        proxy.ready = True

        def look() -> tuple[float, float, int, int]:
            return cpu_seconds(link.pid), cpu_seconds(os.getpid()), proxy.received, proxy.sent

        def over_time() -> list[float]:
            before, began = look(), time.monotonic()
            time.sleep(seconds)
            scale = seconds / (time.monotonic() - began)
            return [scale * (b - a) for a, b in zip(before, look(), strict=True)]

        nobody = over_time()
        for name in names:
            command = engine.supernode(
                f"localhost:{outside}",
                free_port(),
                outer / "ca.crt",
                outer / "sites" / f"{name}.key",
                secret,
            )
            supervisor.start(Child(name, command, folder / f"{name}.log", environment))
        last = time.monotonic() + 120
        while not all("SuperNode ID" in (folder / f"{n}.log").read_text() for n in names):
            assert time.monotonic() < last, "the sites do not connect"
            time.sleep(0.5)
        time.sleep(10)
        somebody = over_time()
    proxy.close()
    link_seconds, proxy_seconds, up, down = (
        (b - a) / sites for a, b in zip(nobody, somebody, strict=True)
    )
    return {
        "sites": sites,
        "engine, CPU s of a site and minute": 60 / seconds * link_seconds,
        "proxy, CPU s of a site and minute": 60 / seconds * proxy_seconds,
        "up, B of a site and minute": 60 / seconds * up,
        "down, B of a site and minute": 60 / seconds * down,
        "sites a core, engine": seconds / link_seconds,
        "sites a core, proxy": seconds / proxy_seconds,
    }


def main() -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--sites", type=int, default=8)
    made.add_argument("--seconds", type=float, default=60.0)
    made.add_argument("--no-hold", action="store_true")
    made.add_argument("--json", action="store_true")
    arguments = made.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), arguments.sites, arguments.seconds, not arguments.no_hold)
    if arguments.json:
        print(json.dumps(row, indent=2))
        return
    for name, value in row.items():
        print(f"{name:36} {value:10.3g}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
