"""What the card of a tuned model says, and that it carries nothing out of the data."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fedforward.config.fields import AT_SITES
from fedforward.config.loading import validate
from fedforward.training.model_card import card
from tests.support.command_line import command, write_config


def configured(**changes: Any) -> Any:
    content: dict[str, Any] = {
        "model": {"path": "someone/model"},
        "data": {"source": "secret.jsonl", "prompt": "{question}", "answer": "{reply}"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content.setdefault(section, {})[name] = value
    return validate(content)


def test_a_run_and_an_export_have_a_card(tmp_path: Path) -> None:
    config = write_config(tmp_path, ['evaluation.metrics=["accuracy"]'])
    assert command("run", config, "method.learning_rate=1e-3", "--out", tmp_path / "run").code == 0
    assert command("export", tmp_path / "run", "--out", tmp_path / "adapter").code == 0
    cards = [ModelCard.load(tmp_path / name / "README.md") for name in ("run/adapter", "adapter")]
    assert cards[0].content == cards[1].content
    text, data = cards[0].text, cards[0].data
    assert (data.library_name, data.base_model) == ("peft", None)
    assert {"lora", "federated-learning"} <= set(data.tags)
    for words in (
        "after 2 rounds",
        "`fedmezo`",
        "2 parties with 4 training examples",
        "2402.05926",
    ):
        assert words in text
    summary = (tmp_path / "run/summary.json").read_text()
    (state,) = [
        row.split(" | ")[1].rstrip(" |") for row in text.splitlines() if "tuned state |" in row
    ]
    assert len(state) == 64 and state in summary
    # Nothing of the data: neither its text, nor its fields, nor its place.
    for secret in ("what is", "it is", "rows.jsonl", str(tmp_path), "{q}"):
        assert secret not in cards[0].content
    # The state of an earlier round has no figures of the last.
    assert command("export", tmp_path / "run", "--round", 1, "--out", tmp_path / "one").code == 0
    assert "None are known of this state." in ModelCard.load(tmp_path / "one/README.md").text
    merged = command("export", tmp_path / "run", "--merge", "--out", tmp_path / "merged")
    assert merged.code == 0
    assert ModelCard.load(tmp_path / "merged/README.md").data.library_name == "transformers"
    assert command("verify", tmp_path / "run").code == 0


def test_a_base_model_of_the_hub_is_named() -> None:
    found = ModelCard(card(configured(), rounds=3, state_digest="ab"))
    assert found.data.base_model == "someone/model"
    assert "A LoRA adapter of `someone/model` after 3 rounds" in found.text
    # Nothing on rows of parties at a site, which knows its own alone.
    assert "How many there were is not known here." in found.text


def test_the_base_model_of_sites_is_named_only_if_it_is_known(tmp_path: Path) -> None:
    text = card(configured(model__path=AT_SITES), rounds=1, state_digest="ab")
    assert AT_SITES not in text and ModelCard(text).data.base_model is None


@pytest.mark.parametrize(
    "damaged",
    [
        {"heldout_loss": 3.0},
        {"heldout_loss": {"start": "<b>", "end": None}},
        {"examples": ["secret"], "heldout_loss": {"start": 1.0, "end": 1.0}},
        {"sites": 3},
        {"bytes_per_client_round": {"up": "many"}, "heldout_loss": {"start": 1.0, "end": 1.0}},
    ],
)
def test_a_damaged_summary_is_left_out(damaged: dict[str, Any]) -> None:
    text = card(configured(), rounds=1, state_digest="ab", summary=damaged)
    assert text == card(configured(), rounds=1, state_digest="ab")


def test_privacy_and_other_methods_are_in_it() -> None:
    private = configured(
        method__learning_rate=1e-3,
        privacy__clip=1.0,
        privacy__noise_multiplier=2.0,
        privacy__delta=1e-5,
        privacy__examples=100,
        federation__weights="equal",
    )
    assert "| privacy.noise_multiplier | 2.0 |" in card(private, rounds=1, state_digest="ab")
    average = card(
        configured(method__name="fedavg", method__learning_rate=1e-3), rounds=1, state_digest="ab"
    )
    assert "trained by backpropagation" in average and "method.mu" not in average
