"""One run from start (or resume) to summary: the loop that `fedforward run` drives.

The loop is readable top to bottom: build the parts, replay what the ledger has, then round after
round until done, and write what was tuned. A `Listener` is told of progress; nothing prints here.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedforward.config.schema import Config
from fedforward.core.batches import AnswerBatch
from fedforward.core.errors import FedForwardError, UpdateNotFiniteError
from fedforward.core.machine import peak_resident_bytes
from fedforward.core.steps import Probe, ProbePlan
from fedforward.evaluation import heldout as evaluation
from fedforward.federation.client import Client, Replica
from fedforward.federation.ledger import Ledger, Round
from fedforward.federation.server import Server
from fedforward.messages.snapshot import Snapshot
from fedforward.methods.report_filters import build_filters
from fedforward.models.loading import longest_sequence, placement
from fedforward.planning.allocator import Allocator
from fedforward.planning.memory.tracker import peak_bytes
from fedforward.training import assembly, run_directory
from fedforward.training import build as experiment
from fedforward.training import metrics as progress
from fedforward.training.metrics import DivergenceError, Listener
from fedforward.training.run_directory import RunDirectory
from fedforward.training.simulation import Attendance, LocalRuntime, Traffic


class Session:
    """A run that is being carried out.

    Attributes:
        lines: the metrics of each round so far; line 0 is the base model.
    """

    def __init__(self, config: Config, out: Path, resume: bool, listener: Listener) -> None:
        self.config = config
        self.directory = RunDirectory(out)
        self.listener = listener
        self.directory.lock()
        try:
            self._build(resume)
        except BaseException:
            self.directory.unlock()
            raise

    def _build(self, resume: bool) -> None:
        """Make the parts, and start the run directory once nothing more can be refused."""
        config, listener = self.config, self.listener
        self.plan = self._claim(resume)
        listener.phase("loading the model")
        self.model, self.tokenizer = experiment.build_model(config, self.plan)
        self._place()
        listener.phase("reading the data")
        positions = longest_sequence(self.model.network)
        self.corpus = experiment.read_corpus(config, self.tokenizer, positions, self.model.classes)
        self.collate = experiment.collate_of(config, self.tokenizer, self.model.classes)
        if not self.directory.started and config.run.memory_budget:
            listener.phase("fitting probes to the memory budget")
            self.plan = experiment.fit_plan(
                config, self.model, self.corpus, assembly.build_method(config), self.collate
            )
            self.model.plan = self.plan
        listener.phase(self._describe_plan())
        self.heldout = evaluation.prepare(
            config, self.corpus.heldout, self.tokenizer, self.plan, self.model.classes
        )
        self.method = assembly.build_method(config)
        allocate = self._allocator()
        with errors_of_the_disk(self.directory.path):
            # Only now: a mistake in the configuration must not leave a run behind. On resume
            # the keys that may change are brought up to date.
            self.directory.start(config, self.plan)
            self.ledger = self._open_ledger()
        self.replica = Replica(self.model, self.method)
        self.server = self._build_server(allocate)
        batches = experiment.client_batches(config, self.corpus, self.collate)
        filters = build_filters(config.method.report_filters, "method.report_filters")
        clients = [
            Client(number, stream, self.replica, filters) for number, stream in enumerate(batches)
        ]
        step = config.method.probes_per_step
        # A float32 copy of all weights carries one client's local steps at a time.
        alone = config.model.tune == "full" and self.plan.trajectory == "cache"
        together = 1 if alone else max(1, self.plan.probes_per_call // step)
        self.widest = self._widest_blocks(allocate, together)
        self.runtime = LocalRuntime(
            self.server, clients, self.model, together, experiment.faults(config)
        )
        self.lines: list[dict[str, Any]] = []
        self.inference_memory = self.peak_memory = 0
        self.commit_measured = False

    def _describe_plan(self) -> str:
        """How probes are grouped and trajectories carried, with the cost, in words."""
        parameters = self.model.layout.parameters
        grouped = self.plan.probes_per_call
        shared = min(self.model.prefix.depths)
        words = f"{grouped} probes a forward pass" if grouped > 1 else "one probe a forward pass"
        if self.model.residency is not None:
            words += ", blocks that rest in host memory"
        if shared:
            words += f", blocks 0 to {shared - 1} once for all"
        if self.config.model.tune == "lora":
            step = self.config.method.probes_per_step
            sums = max(1, grouped // step)
            return f"{words}; adapters for them: {4 * parameters * (grouped + sums) / 1e6:.1f} MB"
        if self.plan.trajectory == "cache":
            return f"{words}; local steps in a float32 copy: {4 * parameters / 1e6:.1f} MB"
        return f"{words}; local steps generated again in each: no memory, more time"

    def _claim(self, resume: bool) -> ProbePlan:
        """Make the run directory ours, or refuse it; returns the plan of the run."""
        directory = self.directory
        if directory.continues(self.config, resume):
            plan = directory.load()[1]
            device = experiment.resolve_device(self.config.run.device)
            if device.split(":")[0] != plan.device.split(":")[0]:
                raise FedForwardError(
                    f"{directory.path} was started on {plan.device}, and run.device = "
                    f"{self.config.run.device!r} is {device} here, where losses have other last "
                    "bits. Resume it on such a device."
                )
            return plan
        return experiment.resolve_plan(self.config)

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
        header = assembly.ledger_header(self.config, experiment.identity(self.model))
        header["data"] = experiment.corpus_fingerprint(self.corpus)
        if not self.directory.ledger.is_file():
            return Ledger.create(self.directory.ledger, header)
        ledger = Ledger(self.directory.ledger)
        check_header(ledger, header)
        return ledger

    def _build_server(self, allocate: Allocator | None) -> Server:
        settings = assembly.server_settings(
            self.config,
            experiment.identity(self.model),
            [len(part) for part in self.corpus.clients],
            allocate,
        )
        return Server(settings, self.method, self.ledger)

    def _allocator(self) -> Allocator | None:
        """Who plans the blocks that clients perturb; None where all perturb all."""
        planning = self.config.planning
        if planning.budgets is None and planning.active is None:
            return None
        self.listener.phase("planning blocks")
        from fedforward.planning.budgets import allocator, survey

        resources = None
        if planning.active is None:
            steps = experiment.widest_steps(self.config, self.corpus, self.collate)
            resources = survey(self.config, self.model, steps)
        examples = [len(part) for part in self.corpus.clients]
        planner = allocator(self.config, self.model, examples, resources)
        # What cannot be kept is refused now, not in some round.
        planner.plan(range(len(examples)))
        return planner

    def run(self) -> dict[str, Any]:
        """Carry the run to its end and write the results; returns the summary.

        Raises:
            DivergenceError: after the results so far have been written.
            FedForwardError: the disk is full; what was committed stays.
        """
        with self.directory.locked(), errors_of_the_disk(self.directory.path):
            self._measure_memory()
            self._restore()
            reason = progress.reason_to_stop(self.config, self.lines)
            while self.server.round < self.config.federation.rounds and not reason:
                began = time.monotonic()
                try:
                    record, traffic, attendance = self.runtime.run_round()
                except UpdateNotFiniteError:
                    reason = "diverged: the update of the next round was not finite"
                    break
                self.peak_memory = max(self.peak_memory, self._first_peak(record))
                self._catch_up()
                self._write_line(record, time.monotonic() - began, traffic, attendance)
                reason = progress.reason_to_stop(self.config, self.lines)
            return self._finish(reason)

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
        self.listener.phase("measuring memory")
        longest = experiment.longest_batches(self.config, self.corpus, self.collate)
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
        self.inference_memory = peak_bytes(inference, model.device)
        step()
        self.peak_memory = peak_bytes(step, model.device)

    def _first_peak(self, record: Round) -> int:
        """Peak bytes of this session's first commit; later ones take no more."""
        if self.commit_measured:
            return 0
        self.commit_measured = True
        return peak_bytes(self._catch_up, self.model.device)

    def _catch_up(self, rounds: int | None = None) -> None:
        """Bring the shared replica to so many rounds of the ledger, or to its end."""
        if not self.method.capabilities.replayable:
            data = self.server.state.encode()
            if data:
                self.replica.restore(Snapshot(self.ledger.length, b"", data))
            return
        last = self.ledger.length if rounds is None else rounds
        entries = self.ledger.entries(self.replica.rounds)
        self.replica.catch_up([entry for entry in entries if entry.round < last])

    def _restore(self) -> None:
        """Replay the ledger, and make the metrics agree with it."""
        self.lines = self.directory.read_metrics(self.ledger.length)
        if not self.lines:
            self.listener.phase("evaluating the base model")
            prompt, expected = self.corpus.example
            self.lines = [
                {
                    "round": 0,
                    **self._measure(),
                    "example": {
                        "prompt": prompt,
                        "expected": expected,
                        "before": self._answer(prompt),
                    },
                    "seconds": 0.0,
                }
            ]
        self.directory.rewrite_metrics(self.lines)
        if self.ledger.length:
            self.listener.phase(f"replaying {self.ledger.length} rounds")
            self._catch_up(self.lines[-1]["round"])
        # A kill between a round and its line loses the line, never the round. What is written
        # again must be what was lost: it decides when the run stops.
        for record in self.ledger.rounds(self.lines[-1]["round"]):
            self._catch_up(record.entry.round + 1)
            self._write_line(record, 0.0)

    def _measure(self) -> dict[str, Any]:
        """The held-out figures at the weights as they are."""
        return evaluation.measure(self.model, self.heldout, self.listener.phase)

    def _answer(self, prompt: str) -> str:
        most = self.config.data.answer_tokens
        return experiment.answer(self.model, self.tokenizer, prompt, most)

    def _write_line(
        self,
        record: Round,
        seconds: float,
        traffic: Traffic | None = None,
        attendance: Attendance | None = None,
    ) -> None:
        line = progress.round_line(record)
        done = line["round"]
        line["seconds"] = self.lines[-1]["seconds"] + seconds
        if traffic is not None:
            line["bytes"] = asdict(traffic)
        if attendance is not None and attendance.reported < attendance.asked:
            line["clients"] = asdict(attendance)
        if self.model.changed_share is not None:
            line["changed_share"] = self.model.changed_share
        due = done % self.config.run.evaluate_every == 0 or done == self.config.federation.rounds
        # The states between are gone where the update is a tensor.
        there = done == self.ledger.length or self.method.capabilities.replayable
        if due and there:
            began = time.monotonic()
            line |= self._measure()
            line["seconds"] += time.monotonic() - began
        self.lines.append(line)
        self.directory.append_metrics(line)
        self.listener.progress(done, self.config.federation.rounds, line)

    def _finish(self, reason: str) -> dict[str, Any]:
        self.listener.phase("writing the results")
        if "heldout_loss" not in self.lines[-1]:
            self.lines[-1] |= self._measure()
            self.directory.rewrite_metrics(self.lines)
        self.model.save(self.directory.tuned(self.config))
        summary = self._summary(reason)
        from fedforward.training.plots import draw

        draw(self.directory.plot, self.lines, summary)
        run_directory.write_json(self.directory.summary, summary)
        self.ledger.close()
        if not math.isfinite(self.lines[0]["heldout_loss"]):
            raise DivergenceError(
                f"The loss of the base model itself is not a number: the weights of model.path = "
                f"{self.config.model.path!r} are damaged, or model.dtype = "
                f"{self.config.model.dtype!r} is too narrow for them (try 'float32')."
            )
        if reason.startswith("diverged"):
            rate = self.config.method.learning_rate
            raise DivergenceError(
                f"The run {reason} after round {self.server.round}. Lower method.learning_rate "
                f"(it is {rate:g}; try {rate / 3:g}) or method.local_steps, or average more "
                f"method.directions. Everything up to here is in {self.directory.path}."
            )
        return summary

    def _summary(self, reason: str) -> dict[str, Any]:
        config, lines = self.config, self.lines
        traffic = [line["bytes"] for line in lines if "bytes" in line]
        shares = [line["changed_share"] for line in lines if "changed_share" in line]
        zeros = [line["zero_gradients"] for line in lines if "zero_gradients" in line]
        example = dict(lines[0]["example"])
        example["after"] = self._answer(example["prompt"])
        return {
            "method": config.method.name,
            "objective": config.method.objective,
            "model": config.model.path,
            "tune": config.model.tune,
            "classes": list(self.model.classes) or None,
            "dtype": config.model.dtype,
            "tuned_parameters": self.model.layout.parameters,
            "clients": config.federation.clients,
            "examples": [len(part) for part in self.corpus.clients],
            "heldout_examples": len(self.corpus.heldout),
            "answers_cut": self.corpus.cut,
            "rows_dropped": self.corpus.dropped,
            "rounds": self.ledger.length,
            "local_steps": config.method.local_steps,
            "stopped": reason or None,
            "heldout_loss": {
                "start": lines[0]["heldout_loss"],
                "end": lines[-1]["heldout_loss"],
                "lowest": min(line["heldout_loss"] for line in lines if "heldout_loss" in line),
            },
            "metrics": {
                name: {"start": value, "end": lines[-1]["metrics"][name]}
                for name, value in lines[0].get("metrics", {}).items()
            },
            "zero_gradients": sum(zeros) / len(zeros) if zeros else None,
            "skipped_steps": sum(line.get("skipped_steps", 0) for line in lines),
            "changed_share": sum(shares) / len(shares) if shares else None,
            "bytes_per_client_round": {
                way: sum(t[way] for t in traffic) / len(traffic) if traffic else None
                for way in ("up", "down")
            },
            "catch_up": {
                "entry_bytes": self.server.entry_bytes,
                "snapshot_bytes": self.server.snapshot_bytes,
                "break_even_rounds": self.server.break_even(),
            },
            "absences": {
                what: sum(line["clients"][what] for line in lines if "clients" in line)
                for what in ("failed", "late", "refused")
            },
            "seconds": lines[-1]["seconds"],
            "peak_memory_bytes": self.peak_memory,
            "inference_memory_bytes": self.inference_memory,
            "peak_resident_bytes": peak_resident_bytes(),
            "ledger_digest": self.ledger.chain.hex(),
            "state_digest": self.model.digest().hex(),
            "example": example,
        }


def check_header(ledger: Ledger, header: dict[str, Any]) -> None:
    """Refuse a ledger that was made with another base model, layout or direction version."""
    for key, value in header.items():
        if ledger.header.get(key) != value:
            what = {
                "base": "the base model's weights have changed since the run started",
                "data": "the data have changed since the run started",
                "classes": "the data have other classes than when the run started",
                "lora": "the adapters are set up in another way",
                "layout": "the model's tuned tensors are not those of the run",
                "direction_version": "it was made with another version of the directions",
            }.get(key, f"its {key} differs")
            raise FedForwardError(
                f"{ledger.path}: {what} ({ledger.header.get(key)!r} there, {value!r} here). "
                "Restore what the run was started with."
            )


@contextmanager
def errors_of_the_disk(path: Path) -> Iterator[None]:
    """Turn a full or failing disk into a sentence; the ledger is whole either way."""
    import sqlite3

    from safetensors import SafetensorError

    try:
        yield
    except (OSError, sqlite3.OperationalError, SafetensorError) as error:
        raise FedForwardError(
            f"{path} cannot be written: {error}. Every finished round is kept; make room and "
            "continue with --resume."
        ) from error
