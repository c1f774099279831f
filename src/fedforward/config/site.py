"""The two halves of a configuration across machines, and how a site puts them together.

The server has `run.toml`, a run's configuration without model and data; its terms go to every site.
A site has `site.toml`: where its model and data are, what they are run on, and what the site will
not do whatever the terms say. Imports no PyTorch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fedforward.config import rules
from fedforward.config.fields import (
    AT_SITES,
    MOST_COUNTED,
    Classes,
    Count,
    PathText,
    Positive,
    ReportFilters,
    Section,
    no_repeats,
)
from fedforward.config.loading import read_toml, validate, validate_as
from fedforward.config.run_section import ACTIVATION_CACHE, RunSection, check_cache
from fedforward.config.schema import Config
from fedforward.config.template import example_of
from fedforward.core.errors import FedForwardError
from fedforward.messages.secure import MOST_SITES

#: Keys that never travel: they are a site's own, the server's alone, or mean nothing across
#: machines.
_LOCAL = {
    "model": {"path", "adapter", "device_map", "offload"},
    "lora": {"init_file"},
    "method": {"mask_file", "aggregator", "tolerated"},
    "data": {
        "source",
        "public",
        "public_rows",
        "weights",
        "subset",
        "split",
        "limit",
        "example",
        "fields",
        "chat_template",
    },
    "evaluation": {"source", "subset", "split", "limit"},
    "run": set(RunSection.model_fields) - {"seed", "evaluate_every", "patience"},
    "planning": {"budgets", "active"},
}


class SiteSection(Section):
    """[site]"""

    name: Annotated[str, Field(max_length=64, pattern=r"^[\w.-]*$")] = Field(
        "", description="what people are shown beside the name that its key is registered under"
    )
    out: PathText = Field(
        "site", description="folder for the log, and for what was tuned at the end"
    )
    keep_messages: bool = Field(
        False,
        description="keep every message, in and out, in OUT/messages; "
        "`fedforward inspect-message` shows one",
    )
    filters: ReportFilters = Field(
        [],
        description="what this site does to its reports before they are sent, in this order, "
        "after the run's method.report_filters",
    )


class SiteModelSection(Section):
    """[model]"""

    path: PathText = Field(description="folder in Hugging Face format, GGUF file, or hub name")
    adapter: PathText | None = Field(
        None, description="folder of the LoRA adapter that the run goes on from, alike at all sites"
    )
    device_map: Literal["none", "auto"] = Field(
        "none", description='"auto" spreads a frozen base over all devices'
    )
    offload: Literal["none", "host"] = Field(
        "none", description='"host" keeps blocks that are not perturbed in host memory'
    )


class SiteLoraSection(Section):
    """[lora]"""

    init_file: PathText | None = Field(
        None, description="file of `fedforward align` with the aligned A, alike at all sites"
    )


class SiteMethodSection(Section):
    """[method]"""

    mask_file: PathText | None = Field(
        None, description="file of `fedforward mask`, alike at all sites"
    )


class SiteDataSection(Section):
    """[data]"""

    source: PathText | list[PathText] = Field(
        description="file, folder or pattern of files, or hub data set; or a list of them"
    )
    weights: list[Positive] | None = Field(
        None, description="shares of the sources among training examples; default by their sizes"
    )
    subset: str | None = Field(None, description="configuration name of a hub data set")
    split: str = Field("train", description="split of a hub data set")
    limit: Count | None = Field(None, description="use only so many examples of the source")
    heldout: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="in place of the terms' share or number of held-out examples"
    )
    fields: dict[str, str] | None = Field(
        None,
        description='what the templates\' fields are called here: { instruction = "question" }',
    )
    chat: str | None = Field(
        None, description="in place of the terms' field with a conversation; see a run's data.chat"
    )
    chat_template: PathText | None = Field(
        None, description="file with a Jinja template, in place of the tokenizer's own"
    )
    classes: Classes | None = Field(
        None, description="in place of the terms' names of a classifier's classes; they are sent"
    )


class SiteRunSection(Section):
    """[run]"""

    device: str = Field("auto", description='"auto", "cpu", "cuda" or "cuda:1"')
    threads: Annotated[int, Field(ge=0)] = Field(0, description="CPU threads; 0 is all cores")
    probes_per_call: Annotated[int, Field(ge=0)] = Field(
        0, description="most probes that share a forward pass; 0 chooses"
    )
    tokens_per_call: Annotated[int, Field(ge=0)] = Field(
        0, description="tokens of a forward pass, beyond which probes or rows wait; 0 chooses"
    )
    memory_budget: str | None = Field(
        None, description='"6 GiB": as many probes together as fit, the model included'
    )
    trajectory: Literal["auto", "recompute", "cache"] = Field(
        "auto",
        description='local steps under full tuning: "recompute" them in every probe, or "cache" '
        "their sum",
    )
    activation_cache: str = Field("auto", description=ACTIVATION_CACHE)

    @model_validator(mode="after")
    def _cache_is_an_amount(self) -> "SiteRunSection":
        check_cache(self.activation_cache)
        return self


class LimitsSection(Section):
    """[limits], of what this site will do"""

    terms: Count = Field(
        100,
        description="most different terms that are looked at, of all runs; OUT/asked/terms.json "
        "has what there were",
    )
    fields: Annotated[list[str], AfterValidator(no_repeats)] = Field(
        [],
        description="fields of the rows that terms may name, with all that lies in them; those "
        "that data.fields names, and a data.chat of this file, need not be repeated",
    )
    rounds: Count = Field(1000, description="most rounds of a run")
    local_steps: Count = Field(1000, description="most local steps of a round")
    directions: Count = Field(64, description="most directions of a step")
    batch_size: Count = Field(1024, description="most examples of a step")
    rank: Count = Field(64, description="most columns of B in an adapter")
    answer_tokens: Count = Field(512, description="most tokens of a generated answer")
    tune: Annotated[list[Literal["lora", "full"]], Field(min_length=1)] = Field(
        ["lora"], description='what may be tuned: "lora", and "full" for all weights'
    )
    head: Annotated[list[Literal["causal", "classification"]], Field(min_length=1)] = Field(
        ["causal"], description='what a network may end in: "causal", "classification"'
    )
    functions: bool = Field(
        False, description="whether objectives and metrics may be Python functions of this machine"
    )
    sum_of: Annotated[int, Field(ge=1, le=MOST_SITES)] = Field(
        1,
        description="sites that a sum of reports must be of at least before this one takes part: "
        "above 1 the terms must have federation.secure_sums",
    )
    heldout: Count = Field(
        1,
        description="held-out examples below which no held-out figures are told: a mean over few "
        "says much of each",
    )
    epsilon: Positive | None = Field(
        None,
        description="most that all runs together may cost a row: terms without [privacy], or with "
        "a larger epsilon than is left, are refused",
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        1e-5, description="with epsilon: most that privacy.delta of all runs may add up to"
    )
    active_blocks: Annotated[int, Field(ge=1, le=MOST_COUNTED)] | None = Field(
        None, description="blocks that this site can perturb at once; default all"
    )


class SiteConfig(Section):
    """A whole `site.toml`."""

    site: SiteSection = SiteSection()
    model: SiteModelSection
    lora: SiteLoraSection = SiteLoraSection()
    data: SiteDataSection
    method: SiteMethodSection = SiteMethodSection()
    run: SiteRunSection = SiteRunSection()
    limits: LimitsSection = LimitsSection()


def load_site(path: Path) -> SiteConfig:
    """Read a `site.toml`.

    Raises:
        FedForwardError: no such file, not TOML, or a key or value that is not legal.
    """
    return validate_as(SiteConfig, read_toml(path), str(path))


def load_partial(path: Path, overrides: list[str]) -> Config:
    """Read a configuration that need not say where model and data are, such as a server's.

    Raises:
        FedForwardError: as `loading.load`.
    """
    content = read_toml(path, overrides)
    for section, key in (("model", "path"), ("data", "source")):
        part = content.setdefault(section, {})
        if isinstance(part, dict):
            part.setdefault(key, AT_SITES)
    return validate(content, str(path))


def load_terms(path: Path, overrides: list[str]) -> Config:
    """Read a server's `run.toml`, see `load_partial`.

    Raises:
        FedForwardError: as `loading.load`, and for what cannot be done across machines.
    """
    config = load_partial(path, overrides)
    check_terms(config, str(path))
    return config


def check_terms(config: Config, origin: str) -> None:
    """Refuse what only a simulation on one machine can do.

    Raises:
        FedForwardError: with a line for each such key.
    """
    problems = []
    if not rules.capabilities(config.method.name).forward_only:
        problems.append(
            f"method.name = {config.method.name!r} sends whole tensors and trains by "
            "backpropagation; it is for comparison in `fedforward run`. Across machines only "
            "scalars travel."
        )
    if not config.simulation.plain:
        problems.append("the section [simulation] is for `fedforward run`. Leave it out.")
    if config.federation.partition != "iid":
        problems.append(
            f"federation.partition = {config.federation.partition!r} divides one data set, and "
            "each site has its own. Leave it out."
        )
    for key in ("budgets", "active"):
        value = getattr(config.planning, key)
        if value is not None:
            problems.append(
                f"planning.{key} = {value!r}: a site says itself what it can perturb, with "
                "limits.active_blocks in its site.toml. Leave it out."
            )
    for key, found, what in (
        ("model.adapter", config.model.adapter, "adapter"),
        ("lora.init_file", config.lora.init_file, "file"),
        ("method.mask_file", config.method.mask_file, "file"),
    ):
        if found is not None:
            problems.append(
                f"{key} = {found!r}: each site has the {what} itself, and names it with {key} in "
                "its site.toml. Leave it out."
            )
    if config.data.public is not None:
        problems.append(
            f"data.public = {config.data.public!r} is read by `fedforward align` and `mask`, "
            "before the run. Leave it out."
        )
    if config.privacy.withholds and config.run.patience:
        problems.append(
            f"run.patience = {config.run.patience} waits for held-out figures, and [privacy] "
            "withholds them (privacy.heldout). Leave it out."
        )
    if config.privacy.withholds and config.run.on_divergence == "rollback":
        problems.append(
            "run.on_divergence = 'rollback' goes back to the lowest held-out loss, and [privacy] "
            "withholds it (privacy.heldout). Leave it out."
        )
    if config.evaluation.source is not None:
        problems.append(
            f"evaluation.source = {config.evaluation.source!r}: sites evaluate on their own "
            "held-out examples. Leave it out, or name one site with evaluation.site."
        )
    if problems:
        head = f"{origin}: " if len(problems) == 1 else f"{origin}:\n  "
        raise FedForwardError(head + "\n  ".join(problems))


def terms(config: Config) -> dict[str, Any]:
    """What sites are told of a run: every section without the keys that are a site's own."""
    content = config.with_objective().model_dump()
    del content["simulation"]
    return {
        section: {
            key: value for key, value in values.items() if key not in _LOCAL.get(section, set())
        }
        for section, values in content.items()
    }


def join(given: dict[str, Any], site: SiteConfig) -> Config:
    """A whole configuration from a server's terms and a site's own half.

    Raises:
        FedForwardError: the terms are none, or do not fit what is here.
    """
    content: dict[str, Any] = {
        section: {k: v for k, v in values.items() if k not in _LOCAL.get(section, set())}
        for section, values in given.items()
        if isinstance(values, dict) and section != "simulation"
    }
    for section in ("model", "lora", "data", "method", "run"):
        own = getattr(site, section).model_dump(exclude_none=True)
        content.setdefault(section, {}).update(own)
    # A site is one client of one, whatever the number of the others.
    federation = content.setdefault("federation", {})
    least = federation.get("secure_threshold")
    summed = federation.get("secure_sums") is True and type(least) is int
    federation |= {"clients": least if summed else 1, "participation": 1.0, "quorum": 1}
    config = validate(content, "the server's terms with this site's configuration")
    config = config.model_copy(
        update={"federation": config.federation.model_copy(update={"clients": 1})}
    )
    if config.lora.init == "aligned" and config.lora.init_file is None:
        raise FedForwardError(
            "lora.init = 'aligned': the site.toml of this site has no lora.init_file. Get the file "
            "from whoever starts the run, who makes it with `fedforward align`, and name it there."
        )
    if config.method.mask == "file" and config.method.mask_file is None:
        raise FedForwardError(
            "method.mask = 'file': the site.toml of this site has no method.mask_file. Get the "
            "file from whoever starts the run, who makes it with `fedforward mask`, and name it "
            "there."
        )
    return config


def example_site() -> str:
    """A commented `site.toml` with every key, for `fedforward init --site`."""
    return example_of(
        SiteConfig,
        "# A site of a federation: `fedforward client THIS_FILE --server HOST:PORT --tls CERTS "
        "--key KEY`.\n# Commented keys show their defaults.",
    )
