"""A simulated run: what it is built from, and its rounds on one copy of the base weights.

The constructor of `Run` builds model, data, server and clients; `Run.fit` carries the run to its
end with `training.loop`. Phases are logged; nothing prints here.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config import paths
from fedforward.config.schema import Config
from fedforward.core.batches import AnswerBatch
from fedforward.core.errors import FedForwardError
from fedforward.core.files import write_bytes
from fedforward.core.logs import PHASES
from fedforward.core.machine import peak_resident_bytes
from fedforward.core.paths import absolute_text
from fedforward.core.steps import Probe, ProbePlan
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.client import Client, Replica
from fedforward.federation.ledger import Ledger
from fedforward.federation.server import Server
from fedforward.messages.entry import takes_back
from fedforward.messages.snapshot import Snapshot
from fedforward.models.base import CausalModel
from fedforward.models.loading import longest_sequence, placement
from fedforward.models.lora import LoraModel
from fedforward.models.pinned_files import PinnedFile
from fedforward.planning.allocator import Allocator
from fedforward.planning.memory.growth import (
    GrowthWatch,
    alive_beside_kept,
    kept_bytes,
    parts_of,
)
from fedforward.planning.memory.tracker import before_and_peak, peak_bytes
from fedforward.training import activation_cache, assembly, build, summary
from fedforward.training.callbacks import Callbacks
from fedforward.training.divided import write_divided
from fedforward.training.loop import Loop, StopRule
from fedforward.training.metrics import ProgressCallback, RoundOutcome
from fedforward.training.model_card import write_card
from fedforward.training.plots import draw
from fedforward.training.run_directory import RunDirectory, errors_of_the_disk
from fedforward.training.simulation import LocalRuntime
from fedforward.training.summary import Lines, RunSummary, SimulationSummary

LOGGER = logging.getLogger("fedforward.training.run")


class Run:
    """A simulated run; see the module.

    Attributes:
        config: of the run.
        directory: what it writes.
        model: the one model that all clients share.
        corpus: each client's examples and the held-out ones.
        server: the server, on `ledger`.
        runtime: carries messages between the server and the clients.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        resume: bool = False,
        progress: ProgressCallback | None = None,
        built: tuple[CausalModel, Any] | None = None,
        stop: StopRule | None = None,
    ) -> None:
        """Build the parts; nothing is left in `out` where one of them cannot be built.

        Args:
            out: the run directory.
            resume: whether to go on with the run that is in `out`.
            progress: told of each round.
            built: the model at its base weights and its tokenizer, where they are there already.
            stop: may end the run sooner than its settings do.

        Raises:
            FedForwardError: for whatever is wrong with the configuration, the model or the data.
        """
        self.config = config
        self.directory = RunDirectory(out)
        self.progress = progress
        self.callbacks = Callbacks(config.run.callbacks)
        self.stop = stop
        self._initial_a: PinnedFile | None = None
        self.directory.lock()
        try:
            self._build(resume, built)
        except BaseException:
            self.directory.unlock()
            raise

    def _build(self, resume: bool, built: tuple[CausalModel, Any] | None) -> None:
        """Make the parts, and start the run directory once nothing more can be refused."""
        self.method = assembly.build_method(self.config)
        self.plan = self._claim(resume)
        config = self.config
        build.use_threads(self.plan)
        PHASES.info("loading the model")
        reader = build.corpus_reader(config)
        if built is None:
            classes = build.read_classes(config, reader)
            built = build.build_model(config, self.plan, classes)
        else:
            build.set_masks(config, built[0])
        self.model, self.tokenizer = built
        self.model.plan = self.plan
        self.model.drop_activations()
        self._place()
        PHASES.info("reading the data")
        positions = longest_sequence(self.model.network)
        self.corpus = build.read_corpus(
            config, reader, self.tokenizer, positions, self.model.classes
        )
        self._begin_aligned()
        if not self.directory.started:
            budget = " and the memory budget" if config.run.memory_budget else ""
            PHASES.info("fitting probes to the model%s", budget)
            self.model.plan = build.settle_plan(config, self.model, self.method)
        self.collate = build.collate_of(config, self.tokenizer, self.model)
        if not self.directory.started:
            self.plan = build.fit_plan(config, self.model, self.corpus, self.method, self.collate)
            self.model.plan = self.plan
        else:
            longest = build.longest_batches(config, self.corpus, self.collate)
            activation_cache.resumed(config, self.model, longest)
        PHASES.info(self._describe_plan())
        self.heldout = evaluation.prepare(
            config, self.corpus.heldout, self.tokenizer, self.plan, self.model.classes
        )
        allocate = self._allocator()
        with errors_of_the_disk(self.directory.path):
            # Only now: a mistake in the configuration must not leave a run behind. On resume
            # the keys that may change are brought up to date, once model and data are the run's.
            if self.directory.started:
                self.ledger = self._open_ledger()
                self.directory.start(config, self.plan)
            else:
                self._keep_initial_a()
                write_divided(self.directory.path, config, self.corpus, self.model.layout.blocks)
                self.directory.start(config, self.plan)
                self.ledger = self._open_ledger()
        self.replica = Replica(self.model, self.method)
        self.server = self._build_server(allocate)
        batches = build.client_batches(config, self.corpus, self.collate)
        filters = assembly.filters_of(config)
        mechanism = assembly.mechanism_of(config)
        clients = [
            Client(
                number,
                stream,
                self.replica,
                filters,
                sums=config.federation.secure_sums,
                mechanism=mechanism,
            )
            for number, stream in enumerate(batches)
        ]
        step = config.method.probes_per_step
        # A float32 copy of all weights carries one client's local steps at a time.
        alone = config.model.tune == "full" and self.plan.trajectory == "cache"
        together = 1 if alone else max(1, self.plan.probes_per_call // step)
        self.widest = self._widest_blocks(allocate, together)
        self.runtime = LocalRuntime(
            self.server, clients, self.model, together, build.faults(config), build.attack(config)
        )
        self._inference_memory = self._peak_memory = 0
        self._commit_measured = False
        self._growth = GrowthWatch(
            partial(parts_of, self.model), partial(alive_beside_kept, self.model)
        )

    def fit(self) -> RunSummary:
        """Carry the run to its end and write the results.

        Raises:
            DivergenceError: after the results so far have been written.
            FedForwardError: the disk is full; what was committed stays.
        """
        with self.directory.locked(), errors_of_the_disk(self.directory.path):
            self._measure_memory()
            loop = Loop(
                self.config,
                self.directory,
                self.ledger,
                self,
                progress=self.progress,
                callbacks=self.callbacks,
                stop=self.stop,
            )
            try:
                return loop.run()
            finally:
                # A run that has diverged has results as well.
                if loop.summary is not None:
                    content = loop.summary.to_json()
                    draw(self.directory.plot, loop.lines, content)
                    write_card(
                        self.directory.tuned(self.config),
                        self.config,
                        rounds=loop.summary.rounds,
                        state_digest=content["state_digest"],
                        ledger_digest=loop.summary.ledger_digest,
                        summary=content,
                    )

    def _describe_plan(self) -> str:
        """How probes are grouped and trajectories kept, with the cost, in words."""
        parameters = self.model.layout.parameters
        grouped = self.plan.probes_per_call
        shared = min(self.model.prefix.depths) if self.plan.shares_prefix else 0
        words = f"{grouped} probes a forward pass" if grouped > 1 else "one probe a forward pass"
        if self.model.offload is not None:
            words += ", blocks offloaded to host memory"
        if kept := activation_cache.described(self.model, self.corpus):
            words += f", {kept}"
        elif shared:
            words += f", blocks 0 to {shared - 1} once for all"
        if self.config.model.tune == "lora":
            step = self.config.method.probes_per_step
            sums = max(1, grouped // step)
            return f"{words}; adapters for them: {4 * parameters * (grouped + sums) / 1e6:.1f} MB"
        if self.plan.trajectory == "cache":
            return f"{words}; local steps in a float32 copy: {4 * parameters / 1e6:.1f} MB"
        return f"{words}; local steps recomputed in each: no memory, more time"

    def _claim(self, resume: bool) -> ProbePlan:
        """Make the run directory ours, or refuse it; returns the plan of the run."""
        directory = self.directory
        if directory.continues(self.config, resume):
            started, plan = directory.load()
            self.config = paths.as_started(self.config, started)
            device = build.resolve_device(self.config.run.device)
            if device.split(":")[0] != plan.device.split(":")[0]:
                raise FedForwardError(
                    f"{directory.path} was started on {plan.device}, and run.device = "
                    f"{self.config.run.device!r} is {device} here, where losses have other last "
                    "bits. Resume it on such a device."
                )
            return plan
        return build.resolve_plan(self.config)

    def _begin_aligned(self) -> None:
        """Give aligned adapters their A, unless a file was given: made now, or of this run.

        Raises:
            FedForwardError: the run has begun with one that is gone or damaged.
        """
        lora = self.config.lora
        if lora.init != "aligned" or lora.init_file is not None:
            return
        assert isinstance(self.model, LoraModel)
        if self.directory.started:
            initial = build.initial_a_of(self.directory)
        else:
            PHASES.info("aligning adapters")
            initial = build.align(self.config, self.model, self.tokenizer, self.corpus)
        self.model.begin_with(initial)
        self._initial_a = initial

    def _keep_initial_a(self) -> None:
        """Keep an A that was made for this run, for all who replay it."""
        if self._initial_a is not None:
            write_bytes(self.directory.initial_a, self._initial_a.data)

    def _place(self) -> None:
        """Note where the parts of a network lie that is spread over devices, or compare it."""
        here = placement(self.model.network)
        if not self.directory.started:
            self.plan = self.model.plan = replace(self.plan, placement=here)
        elif here != self.plan.placement:
            raise FedForwardError(
                f"{self.directory.path} was started with its model on "
                f"{self.plan.placement or 'one device'}, and here it is on {here or 'one device'}, "
                "where losses have other last bits. Resume it on such devices, with as much free "
                "memory as they had then."
            )

    def _open_ledger(self) -> Ledger:
        header = assembly.ledger_header(self.config, build.identity(self.model))
        header["data"] = self.corpus.fingerprint()
        if not self.directory.ledger.is_file():
            self.directory.check_length(0)
            return Ledger.create(self.directory.ledger, header)
        ledger = Ledger(self.directory.ledger)
        assembly.check_header(ledger, header)
        self.directory.check_length(ledger.length)
        return ledger

    def _build_server(self, allocate: Allocator | None) -> Server:
        settings = assembly.server_settings(
            self.config,
            build.identity(self.model),
            [len(part) for part in self.corpus.clients],
            allocate,
        )
        return Server(settings, self.method, self.ledger)

    def _allocator(self) -> Allocator | None:
        """Who plans the blocks that clients perturb; None where all perturb all."""
        planning = self.config.planning
        if planning.budgets is None and planning.active is None:
            return None
        PHASES.info("planning blocks")
        from fedforward.planning.budgets import allocator, survey

        resources = None
        if planning.active is None:
            steps = build.widest_steps(self.config, self.corpus, self.collate)
            kept = activation_cache.largest_bytes(self.model, self.corpus)
            resources = survey(self.config, self.model, steps, kept)
        examples = [len(part) for part in self.corpus.clients]
        planner = allocator(self.config, self.model, examples, resources)
        # What cannot be kept is refused now, not in some round.
        planner.plan(range(len(examples)))
        return planner

    def _widest_blocks(self, allocate: Allocator | None, together: int) -> NDArray[np.bool_] | None:
        """Blocks of the client that perturbs most, bool [B]; of all, if they advance together.

        None is every block.
        """
        if allocate is None:
            return None
        matrix = allocate(range(len(self.corpus.clients)))
        if together > 1:
            return np.asarray(matrix.any(axis=0))
        sizes = np.array(self.model.layout.block_sizes)
        return np.asarray(matrix[(matrix * sizes).sum(axis=1).argmax()])

    def _measure_memory(self) -> None:
        """Peak bytes of the widest step and of plain inference on one of its batches."""
        PHASES.info("measuring memory")
        longest = build.longest_batches(self.config, self.corpus, self.collate)
        model = self.model
        widest = max(longest, key=lambda batch: batch.tokens.shape[1])

        def inference() -> None:
            if isinstance(widest, AnswerBatch):
                model.generate([Probe(widest.prompts)])
                return
            model.infer(widest)

        def step() -> None:
            batches = [longest[n % len(longest)] for n in range(self.runtime.together)]
            self.method.rehearse(model, batches, self.widest)

        # Inference first: the buffers that a step leaves behind are not inference's.
        inference()
        self._inference_memory = peak_bytes(inference, model.device)
        step()
        self._peak_memory = peak_bytes(step, model.device)
        if model.kept is not None and model.device.type == "cpu":
            # It fills up over the rounds.
            largest = activation_cache.largest_bytes(model, self.corpus)
            self._peak_memory += max(0, largest - model.kept.size)

    # ---- the rounds, as the loop asks for them -----------------------------------------------

    def restore(self, rounds: int) -> Iterator[RoundOutcome]:
        """See `RoundRunner`: the model is brought to each round."""
        if self.ledger.length:
            PHASES.info("replaying %d rounds", self.ledger.length)
            self.catch_up(rounds)
        for record in self.ledger.rounds(rounds):
            self.catch_up(record.entry.round + 1)
            yield RoundOutcome(record, changed_share=self.model.changed_share)

    def run_round(self) -> RoundOutcome:
        """One whole round; the model is brought to it."""
        before = replace(self.model.work)
        outcome = self.runtime.run_round()
        passes = self.model.work.since(before).passes
        if not self._commit_measured:
            # Later commits take no more.
            self._commit_measured = True
            alive, peak = before_and_peak(self.catch_up, self.model.device)
            self._peak_memory = max(self._peak_memory, peak)
            self._growth.begin(alive - kept_bytes(self.model))
        self.catch_up()
        if words := self._growth.look(self._peak_memory, self.ledger.length):
            LOGGER.warning("%s", words)
        return replace(outcome, changed_share=self.model.changed_share, passes=passes)

    def go_back(self, rounds: int) -> RoundOutcome:
        """See `RoundRunner`."""
        record = self.server.go_back(rounds)
        self.catch_up()
        for client in range(len(self.server.examples)):
            # All of them work on the one replica.
            self.server.arrived(client)
        return RoundOutcome(record, changed_share=self.model.changed_share)

    def catch_up(self, rounds: int | None = None) -> None:
        """Bring the shared replica to so many rounds of the ledger, or to its end."""
        if not self.method.capabilities.replayable:
            data = self.server.state.encode()
            if data:
                self.replica.restore(Snapshot(self.ledger.length, b"", b"", data))
            return
        last = self.ledger.length if rounds is None else rounds
        entries = list(self.ledger.entries(self.replica.rounds, last))
        if takes_back(entries, self.replica.rounds):
            entries = list(self.ledger.entries(0, last))
        self.replica.catch_up(entries)

    def evaluate(self, rounds: int) -> dict[str, Any]:
        """The held-out figures at the model's weights, which are those after `rounds` rounds.

        Nothing for a round before the last whose update was a tensor: its state is gone.
        """
        if 0 < rounds < self.ledger.length and not self.method.capabilities.replayable:
            return {}
        if rounds:
            return evaluation.measure(self.model, self.heldout)
        PHASES.info("evaluating the base model")
        figures = evaluation.measure(self.model, self.heldout)
        asked = self.corpus.example
        example = {"prompt": asked.text, "expected": asked.expected, "before": self._answer()}
        return figures | {"example": example}

    def _answer(self) -> str:
        """The answer to the run's example at the model's weights."""
        prompt = self.corpus.example.tokens
        return build.answer(self.model, self.tokenizer, prompt, self.config.data.answer_tokens)

    def finish(self, lines: Lines) -> SimulationSummary:
        """Save what was tuned."""
        PHASES.info("writing the results")
        self.model.save(self.directory.tuned(self.config))
        shares = [line["changed_share"] for line in lines if "changed_share" in line]
        zeros = [line["zero_gradients"] for line in lines if "zero_gradients" in line]
        asked = self.corpus.example
        # The line may have lost it, and the base model's answer with it.
        unknown = {"prompt": asked.text, "expected": asked.expected, "before": ""}
        example = lines[0]["example"] or unknown
        return SimulationSummary(
            model=absolute_text(self.config.model.path),
            classes=list(self.model.classes) or None,
            dtype=self.config.model.dtype,
            tuned_parameters=self.model.layout.parameters,
            clients=self.config.federation.clients,
            examples=[len(part) for part in self.corpus.clients],
            heldout_examples=len(self.corpus.heldout),
            answers_cut=self.corpus.cut,
            rows_dropped=self.corpus.dropped,
            zero_gradients=summary.mean(zeros),
            skipped_steps=sum(line.get("skipped_steps", 0) for line in lines),
            changed_share=summary.mean(shares),
            bytes_per_client_round=summary.mean_traffic(lines),
            catch_up=summary.CatchUpCost(
                self.server.entry_bytes, self.server.snapshot_bytes, self.server.break_even()
            ),
            absences=summary.absences(lines),
            peak_memory_bytes=self._peak_memory,
            inference_memory_bytes=self._inference_memory,
            peak_resident_bytes=peak_resident_bytes(),
            state_digest=self.model.digest().hex(),
            example=summary.Example(**example, after=self._answer()),
        )
