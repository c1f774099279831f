"""The `README.md` beside what was tuned: a model card in the form that the hub reads.

It says what was done, with which settings, what came of it, and by which digests it is checked. Of
the data it has counts only: no text, no field, no file and no name of a site. Imports no PyTorch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedforward.config.fields import AT_SITES
from fedforward.config.schema import Config
from fedforward.core.paths import is_path
from fedforward.core.version import __version__
from fedforward.training.run_directory import write_text

NAME = "README.md"
#: Of each built-in method, where it was published.
_PAPERS = {
    "fedmezo": ("FedMeZO", "2402.05926"),
    "fedmezo-auto": ("FedMeZO", "2402.05926"),
    "decomfl": ("DeComFL", "2405.15861"),
    "feedsign": ("FeedSign", "2501.17610"),
    "zorba": ("ZorBA", "2603.04436"),
    "fedkseed": ("FedKSeed", "2312.06353"),
    "fedkseed-pro": ("FedKSeed", "2312.06353"),
}
_BACKPROPAGATION = "Clients sent the tuned tensors, which they trained by backpropagation."
_FORWARD = "Clients ran the model forward only, and sent a few numbers a round."


def write_card(
    folder: Path,
    config: Config,
    *,
    rounds: int,
    state_digest: str,
    ledger_digest: str = "",
    summary: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> None:
    """Write the card of what lies in `folder`; see `card`."""
    text = card(
        config,
        rounds=rounds,
        state_digest=state_digest,
        ledger_digest=ledger_digest,
        summary=summary,
        whole=whole,
    )
    write_text(folder / NAME, text)


def card(
    config: Config,
    *,
    rounds: int,
    state_digest: str,
    ledger_digest: str = "",
    summary: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> str:
    """The text of a card.

    Args:
        rounds: that are in the tuned state.
        state_digest: SHA-256 of the tuned tensors, hexadecimal.
        ledger_digest: the ledger's chain hash after these rounds, hexadecimal; empty at a site,
            which has no ledger.
        summary: of the run, as in `summary.json`, if it ends with these rounds.
        whole: whether an adapter was merged into its base.
    """
    from huggingface_hub import ModelCardData

    found = _whole(config, summary or {})
    adapter = config.model.tune == "lora" and not whole
    public = _public(config.model.path)
    named = "A LoRA adapter" if adapter else "A model"
    head = ModelCardData(
        base_model=public,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=None if config.model.head == "classification" else "text-generation",
        tags=["federated-learning", "zeroth-order", "fedforward", *(["lora"] * adapter)],
    )
    method = config.method
    of = f" of `{public}`" if public and adapter else ""
    sent = _BACKPROPAGATION if method.name == "fedavg" else _FORWARD
    lines = [
        "---",
        head.to_yaml().strip(),
        "---",
        "",
        f"# {named}{of}, tuned with fedforward",
        "",
        f"{named}{of} after {rounds} rounds of federated tuning with `{method.name}`.",
        sent,
        *_base(public, adapter),
        "",
        "## Data",
        "",
        *_data(found),
        "",
        "## Figures",
        "",
        *_figures(config, found),
        "",
        "## Settings",
        "",
        *_table("key", "value", _settings(config).items()),
        "",
        "## Digests",
        "",
        "`fedforward verify RUN` makes the tuned state again from base and ledger, and compares.",
        "",
        *_table("what", "SHA-256", _digests(state_digest, ledger_digest).items()),
        "",
        "## Limits",
        "",
        "The card says what was measured on held-out rows of the run, and nothing of other text.",
        "Licence and uses are those of the base model and of the data.",
        *_papers(method.name),
        "",
    ]
    return "\n".join(lines)


def _whole(config: Config, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The summary; nothing of one that was damaged, or that another release wrote otherwise."""
    try:
        _data(summary)
        _figures(config, summary)
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
    return dict(summary)


def _public(path: str) -> str | None:
    """The name of a base model, unless it is a place on some machine."""
    return None if path == AT_SITES or is_path(path) else path


def _base(public: str | None, adapter: bool) -> list[str]:
    if public:
        return [] if adapter else [f"The base model was `{public}`."]
    words = "The base model was a folder of whoever ran it"
    return [f"{words}; `adapter_config.json` names it." if adapter else f"{words}."]


def _data(summary: Mapping[str, Any]) -> list[str]:
    examples = summary.get("examples")
    if examples is None and "sites" in summary:
        examples = list(summary["sites"].values())
    if not examples:
        return ["Rows of each party stayed with it. How many there were is not known here."]
    least, most = min(examples), max(examples)
    each = f"{least:d}" if least == most else f"{least:d} to {most:d}"
    text = [f"{len(examples)} parties with {each} training examples each, which stayed with them."]
    if summary.get("heldout_examples"):
        text.append(f"{summary['heldout_examples']} examples were held out.")
    return text


def _figures(config: Config, summary: Mapping[str, Any]) -> list[str]:
    loss = summary.get("heldout_loss")
    if not loss:
        return ["None are known of this state."]
    rows = [("held-out loss, nats per token", _number(loss["start"]), _number(loss["end"]))]
    for name, change in summary.get("metrics", {}).items():
        rows.append((f"held-out {name}", _number(change["start"]), _number(change["end"])))
    lines = _table("figure", "base model", rows, "tuned")
    traffic = summary.get("bytes_per_client_round") or summary.get("message_bytes") or {}
    if traffic.get("up") is not None:
        lines += ["", f"A client sent {traffic['up']:.0f} bytes a round."]
    if summary.get("stopped"):
        lines += ["", "The run ended before its last round."]
    return lines


def _settings(config: Config) -> dict[str, Any]:
    method = config.method
    found: dict[str, Any] = {
        "method.name": method.name,
        "method.learning_rate": method.learning_rate,
        "method.local_steps": method.local_steps,
        "method.batch_size": method.batch_size,
        "federation.rounds": config.federation.rounds,
        "federation.participation": config.federation.participation,
        "run.seed": config.run.seed,
        "model.dtype": config.model.dtype,
    }
    if method.name != "fedavg":
        found |= {
            "method.estimator": method.estimator,
            "method.directions": method.directions,
            "method.mu": method.mu,
            "method.distribution": method.distribution,
            "method.aggregator": method.aggregator,
        }
    if config.model.tune == "lora":
        found |= {"lora.rank": config.lora.rank, "lora.init": config.lora.init}
    if config.privacy.on:
        found |= {
            "privacy.clip": config.privacy.clip,
            "privacy.noise_multiplier": config.privacy.noise_multiplier,
            "privacy.delta": config.privacy.delta,
        }
    return {**found, "fedforward": __version__}


def _digests(state: str, ledger: str) -> dict[str, str]:
    found = {"tuned state": state}
    return {**found, "ledger": ledger} if ledger else found


def _papers(method: str) -> list[str]:
    if method not in _PAPERS:
        return []
    name, number = _PAPERS[method]
    return ["", f"The method is {name}, [arXiv:{number}](https://arxiv.org/abs/{number})."]


def _table(first: str, second: str, rows: Any, third: str = "") -> list[str]:
    heads = [first, second, *([third] if third else [])]
    lines = [heads, ["---"] * len(heads), *([str(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
