"""The configuration behind `fedforward demo`: four sites, a small model, seconds on two cores."""

import json
from importlib.resources import files
from pathlib import Path

from fedforward.config.loading import validate
from fedforward.config.schema import Config
from fedforward.demo.text import ANSWER, EXAMPLE_QUESTION, PROMPT, site_examples

ROUNDS = 30
PER_SITE = 400
#: The prompt answered before and after; no site holds a question about it.
EXAMPLE_PROMPT = PROMPT.format(question=EXAMPLE_QUESTION)


def prepare(data: Path, rounds: int = ROUNDS) -> Config:
    """Write the sites' examples to `data` and return the demonstration's configuration."""
    rows = site_examples(seed=0, per_site=PER_SITE)
    data.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # Another process may be reading it for a demonstration in the same folder.
    if not data.is_file() or data.read_text(encoding="utf-8") != text:
        data.write_text(text, encoding="utf-8")
    return validate(
        {
            "model": {"path": str(files("fedforward.demo").joinpath("model"))},
            "data": {
                "source": str(data),
                "prompt": PROMPT,
                "answer": ANSWER,
                "heldout": 0.1,
                "sequence_length": 128,
                "example": EXAMPLE_PROMPT,
            },
            "federation": {
                "clients": 4,
                "rounds": rounds,
                "partition": "by-field",
                "field": "site",
            },
            "method": {"name": "fedmezo-auto"},
            # Of a model this small a second thread does less than waking it takes.
            "run": {"evaluate_every": 2, "threads": 1},
        }
    )
