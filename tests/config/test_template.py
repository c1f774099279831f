"""Writing configurations: every value survives TOML, and the example has every key."""

import re
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedforward.config.loading import validate
from fedforward.config.schema import Config, sections_of
from fedforward.config.template import example, to_toml


def _all_differ(words: dict[str, str]) -> bool:
    return len(set(words.values())) == len(words)


texts = st.text(st.characters(exclude_categories=["Cs"]))
#: No path is empty, holds a control character or begins in a home folder that is not there.
paths = st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(
    lambda text: bool(text.strip()) and text[0] != "~"
)


@given(
    path=paths,
    prompt=texts,
    targets=st.one_of(texts, st.lists(texts)),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False),
    seed=st.integers(0, 2**63 - 1),
    limit=st.none() | st.integers(1),
    words=st.none() | st.dictionaries(texts, texts, min_size=2).filter(_all_differ),
)
def test_toml_keeps_every_value(
    path: str,
    prompt: str,
    targets: Any,
    rate: float,
    seed: int,
    limit: int | None,
    words: dict[str, str] | None,
) -> None:
    given_ = validate(
        {
            "model": {"path": path},
            "lora": {"targets": targets},
            "data": {"source": "d", "prompt": prompt, "limit": limit, "label_words": words},
            "method": {"learning_rate": rate, "mu": 1e-3},
            "run": {"seed": seed},
        }
    )
    assert validate(tomllib.loads(to_toml(given_))) == given_


def test_the_example_is_whole() -> None:
    text = example()
    asked = validate(tomllib.loads(text))
    shown = re.sub(r"^# (\w+ = .+)$", r"\1", text, flags=re.MULTILINE)
    everything = tomllib.loads(shown)
    for setting in ("candidates", "optimizer"):
        assert everything["method"].pop(setting), "of methods that this file does not name"
    assert validate(everything) == asked
    for section, kind in sections_of(Config).items():
        for key in kind.model_fields.keys() - {"parameters"}:
            assert re.search(rf"^(# )?{key} =", text, re.MULTILINE)
            if kind.model_fields[key].default is not None:
                assert key in everything[section]
