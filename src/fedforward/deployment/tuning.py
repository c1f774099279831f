"""What a site builds for a run: model, data and method, within its own limits.

What goes wrong is a refusal. Needs PyTorch.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedforward.config.schema import Config, sections_of
from fedforward.config.site import SiteConfig, join
from fedforward.core.errors import FedForwardError, MessageError
from fedforward.core.identity import ModelIdentity
from fedforward.core.paths import home
from fedforward.data.corpus import Corpus, CorpusReader
from fedforward.data.rows import fingerprints
from fedforward.data.sampler import Batches, Collate
from fedforward.data.templates import Template
from fedforward.deployment.asked import Asked
from fedforward.deployment.limits import released, spending_folder
from fedforward.deployment.secure import sum_site
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.budget import Accounts, Budget
from fedforward.federation.client import Client, Replica
from fedforward.federation.releases import Releases
from fedforward.federation.witness import Seen, read_witness
from fedforward.messages.refusal import Refusal, RefusalCode
from fedforward.methods.base import Method
from fedforward.methods.privacy import Mechanism
from fedforward.methods.report_filters import ReportFilter, build_filters
from fedforward.models.base import CausalModel
from fedforward.models.loading import longest_sequence
from fedforward.training import build as experiment
from fedforward.training.assembly import build_method, filters_of, guarantee_of, mechanism_of

if TYPE_CHECKING:
    from fedforward.deployment.secure.site_side import SumSite

#: Names of keys that a refusal may have; values of any of them stay here.
_KEYS = sorted(
    {
        f"{section}.{key}"
        for kind in (Config, SiteConfig)
        for section, part in sections_of(kind).items()
        for key in part.model_fields
    }
)
_NAMED = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, _KEYS))})(?![\w.]*\w)")


class RefusedError(FedForwardError):
    """What a site will not do: the sentence is for its own log, the refusal for the server."""

    def __init__(self, sentence: str, refusal: Refusal) -> None:
        super().__init__(sentence)
        self.refusal = refusal


@dataclass
class Tuning:
    """What a site has built for one run.

    Attributes:
        run: the run's random name.
        terms: as the server sent them.
        clients: the one that this site is, by the number that the server gave it.
        asked: how often each kind of message was answered that measures something.
        sums: masks reports, where the terms have secure sums.
        mechanism: clipping and noise, where the terms have privacy.
        releases: the rounds that were answered with noise, kept in a file.
    """

    run: bytes
    terms: dict[str, Any]
    config: Config
    corpus: Corpus
    collate: Collate
    heldout: evaluation.HeldOut
    replica: Replica
    method: Method
    identity: ModelIdentity
    filters: tuple[ReportFilter, ...] = ()
    sums: "SumSite | None" = None
    mechanism: Mechanism | None = None
    releases: Releases | None = None
    clients: dict[int, Client] = field(default_factory=dict)
    asked: Asked = field(default_factory=Asked)

    @property
    def model(self) -> CausalModel:
        """The model that the replica brings forward."""
        return self.replica.model

    def client(self, number: int) -> Client:
        """This site under the number that the server knows it by."""
        if number not in self.clients:
            if self.clients:
                raise MessageError(
                    f"A task of client {number} was refused: this site is "
                    f"{next(iter(self.clients))}."
                )
            method = self.config.method
            batches = Batches(
                self.corpus.clients[0],
                batch_size=method.batch_size,
                run_seed=self.config.run.seed,
                client=number,
                collate=self.collate,
            )
            self.clients[number] = Client(
                number,
                batches,
                self.replica,
                self.filters,
                sums=self.sums is not None,
                mechanism=self.mechanism,
                releases=self.releases,
            )
        return self.clients[number]

    def answer_tokens(self) -> int:
        """Held-out answer tokens, which a mean loss is weighted by."""
        return sum(int(example.counted.sum()) for example in self.corpus.heldout)


def build(run: bytes, terms: dict[str, Any], settings: SiteConfig) -> Tuning:
    """Load model and data for a run.

    Raises:
        RefusedError: for whatever is wrong with either, or with the terms.
    """
    with refusing(RefusalCode.TERMS):
        config = join(terms, settings)
        reader = experiment.corpus_reader(config)
        plan = experiment.resolve_plan(config)
        _check_classes(config)
        mechanism = mechanism_of(config)
        asked = asked_of(run, settings)
    with refusing(RefusalCode.LIMITS):
        _check_privacy(config, settings)
    with refusing(RefusalCode.DATA):
        _check_conversation(config, reader, settings)
        _check_columns(config, reader, settings)
        releases = releases_of(run, config, settings, reader)
        classes = experiment.read_classes(config, reader)
    with refusing(RefusalCode.MODEL):
        model, tokenizer = experiment.build_model(config, plan, classes)
    with refusing(RefusalCode.DATA):
        corpus = experiment.read_corpus(
            config, reader, tokenizer, longest_sequence(model.network), model.classes
        )
    with refusing(RefusalCode.TERMS):
        method = build_method(config)
        model.plan = experiment.settle_plan(config, model, method)
        collate = experiment.collate_of(config, tokenizer, model)
        model.plan = experiment.fit_plan(config, model, corpus, method, collate)
        if not method.capabilities.forward_only:
            raise FedForwardError(f"method.name = {config.method.name!r} would send tensors.")
        heldout = evaluation.prepare(config, corpus.heldout, tokenizer, model.plan, model.classes)
        own = build_filters(settings.site.filters, "site.filters")
        # What the terms bound is bounded last.
        whole = config.privacy.on and config.privacy.level == "client"
        filters = (*own, *filters_of(config)) if whole else (*filters_of(config), *own)
    with refusing(RefusalCode.TERMS):
        replica = Replica(model, method)
        replica.known = seen_before(run, settings)
    return Tuning(
        run=run,
        terms=terms,
        config=config,
        corpus=corpus,
        collate=collate,
        heldout=heldout,
        replica=replica,
        method=method,
        identity=experiment.identity(model, tokenizer),
        filters=filters,
        sums=sum_site(run, config),
        mechanism=mechanism,
        releases=releases,
        asked=asked,
    )


@contextmanager
def refusing(code: RefusalCode) -> Iterator[None]:
    """Makes what goes wrong a refusal with this code.

    Keys that the sentence names go with it, unless it is about the data: then even which key it is
    may depend on a row.
    """
    try:
        yield
    except RefusedError:
        raise
    except FedForwardError as error:
        keys = [] if code is RefusalCode.DATA else _NAMED.findall(str(error))
        raise RefusedError(str(error), Refusal.of(code, keys)) from error


def _check_classes(config: Config) -> None:
    """Refuse to make a classifier's classes of this site's data, which would then be sent."""
    data = config.data
    if config.model.head == "classification" and not (data.classes or data.label_words):
        raise FedForwardError(
            "model.head = 'classification' across machines needs data.classes or data.label_words, "
            "in the terms or in the site.toml of this site: the names of the classes are sent, and "
            "none is taken from a site's data."
        )


def _check_privacy(config: Config, settings: SiteConfig) -> None:
    """Refuse terms that would spend more of the examples' privacy than this site allows."""
    limits, found = settings.limits, guarantee_of(config)
    if limits.epsilon is None:
        return
    if found is None:
        raise FedForwardError(
            f"The terms have no privacy.clip, and this site has limits.epsilon = "
            f"{limits.epsilon:g}."
        )
    if config.privacy.level == "client":
        raise FedForwardError(
            "privacy.level = 'client' has noise that the server adds, and this site has "
            f"limits.epsilon = {limits.epsilon:g}, which is of noise that it adds itself."
        )
    if not config.privacy.withholds:
        raise FedForwardError(
            f"privacy.heldout = {config.privacy.heldout!r} sends figures of held-out rows without "
            f"noise, and this site has limits.epsilon = {limits.epsilon:g}."
        )
    if found.delta > limits.delta:
        raise FedForwardError(
            f"privacy.delta = {found.delta:g} is above this site's limits.delta = {limits.delta:g}."
        )
    spent = found.epsilon(config.federation.rounds)
    if spent > limits.epsilon:
        raise FedForwardError(
            f"{config.federation.rounds} rounds (federation.rounds) with this noise "
            f"(privacy.noise_multiplier) have epsilon {spent:.3f}, above this site's "
            f"limits.epsilon = {limits.epsilon:g}."
        )


def seen_file(settings: SiteConfig, run: bytes) -> Path:
    """Where a site keeps what it has seen of a run."""
    return home(settings.site.out) / "seen" / f"{run.hex()}.json"


def seen_before(run: bytes, settings: SiteConfig) -> dict[int, Seen]:
    """What this site has seen of a run before it was started.

    Raises:
        FedForwardError: the file that says so cannot be read.
    """
    path = seen_file(settings, run)
    return read_witness(path).seen if path.exists() else {}


def releases_of(
    run: bytes, config: Config, settings: SiteConfig, reader: CorpusReader
) -> Releases | None:
    """The rounds of a run that this site has answered with noise, before a restart as well.

    None without `[privacy]`.

    Raises:
        RefusedError: the run costs more than the rows of this site have left, or the files that
            say so cannot be read.
    """
    guarantee, limits = guarantee_of(config), settings.limits
    if guarantee is None or config.privacy.level == "client":
        return None
    most = None if limits.epsilon is None else (limits.epsilon, limits.delta)
    rows = fingerprints(reader.sources)
    folder = spending_folder(settings)
    with refusing(RefusalCode.LIMITS):
        budget = Budget(Accounts(folder), run.hex(), rows, guarantee, most)
        budget.accounts.spent(rows)
        budget.check(config.federation.rounds)
        return Releases(folder / f"{run.hex()}.json", budget)


def asked_of(run: bytes, settings: SiteConfig) -> Asked:
    """How often this site was asked in a run, before a restart as well.

    Raises:
        FedForwardError: the file that says so cannot be read.
    """
    return Asked(home(settings.site.out) / "asked" / f"{run.hex()}.json")


def _check_conversation(config: Config, reader: CorpusReader, settings: SiteConfig) -> None:
    """Refuse conversations that were found in the data and that nobody named."""
    if reader.chat is not None and config.data.chat is None:
        raise FedForwardError(
            f"The data hold conversations in {reader.chat!r}, which the terms do not name. Set "
            "data.chat in the site.toml of this site to release them."
        )


def _check_columns(config: Config, reader: CorpusReader, settings: SiteConfig) -> None:
    """Refuse a path that is a column of its own: its name begins like that of a released one."""
    if reader.chat is not None:
        return
    named = {
        path
        for key in ("prompt", "answer")
        for path in Template.parse(getattr(config.data, key), f"data.{key}").paths
    }
    columns = {name for source in reader.sources for name in source.columns()}
    if closed := sorted(named & columns - released(settings)):
        raise FedForwardError(
            f"The terms name {closed[0]!r}, which is a field of the data that this site has not "
            "released. Name it with limits.fields in site.toml if it may be used."
        )
