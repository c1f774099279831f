"""A federation on one machine with the demonstration's model: its `run.toml` and `site.toml`s."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedforward.config.template import toml_value
from fedforward.demo.text import ANSWER, PROMPT, site_examples

#: Examples of each site.
PER_SITE = 24


def write(folder: Path, sites: int, rounds: int, local_steps: int) -> dict[str, Path]:
    """Write a server's `run.toml` and the sites' folders; returns each site's `site.toml`."""
    names = [f"site-{number + 1}" for number in range(sites)]
    _write(
        folder / "run.toml",
        {
            "lora": {"rank": 2},
            "data": {"prompt": PROMPT, "answer": ANSWER, "heldout": 3, "sequence_length": 64},
            "federation": {"clients": sites, "quorum": sites, "rounds": rounds},
            "method": {
                "learning_rate": 1e-4,
                "mu": 1e-2,
                "local_steps": local_steps,
                "batch_size": 2,
            },
            "run": {"evaluate_every": rounds},
        },
    )
    rows = site_examples(seed=0, per_site=PER_SITE * sites)
    found = {}
    for number, name in enumerate(names):
        own = rows[number::sites][:PER_SITE]
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
        found[name] = folder / f"{name}.toml"
        _write(
            found[name],
            {
                "site": {"out": str(folder / name)},
                "model": {"path": str(files("fedforward.demo").joinpath("model"))},
                "data": {"source": str(source)},
                "run": {"threads": 1, "probes_per_call": 2},
                "limits": {"local_steps": local_steps, "fields": list(own[0]), "heldout": 1},
            },
        )
    return found


def _write(path: Path, content: dict[str, dict[str, Any]]) -> None:
    lines = []
    for section, values in content.items():
        lines += [f"[{section}]", *(f"{key} = {toml_value(v)}" for key, v in values.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
