"""Use fedforward as a library: a federation in fifteen lines, and the loop under it in six.

    python examples/library_use.py [--model FOLDER] [--rounds 20] [--out FOLDER]

The federation writes a run directory that can be resumed and verified. The loop is centralised
MeZO: probe at +mu and -mu along a direction, turn the difference of the losses into a step, apply
it. Both tune the model that ships with fedforward on questions of four sites.
"""

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import fedforward as ff
from fedforward.demo.text import ANSWER, EXAMPLE_QUESTION, PROMPT, site_examples


def federation(path: str, rows: Path, out: Path, rounds: int) -> None:
    """Four sites tune one model without sharing their rows."""
    model = ff.LoraModel.from_pretrained(path, rank=8)
    data = ff.Dataset.from_file(rows, prompt=PROMPT, answer=ANSWER, heldout=0.05)
    method = ff.DeComFL(local_steps=10, estimator=ff.TwoPoint(mu=1e-2))
    run = ff.Simulation(
        model,
        data.partition(clients=4, by="site"),
        method,
        learning_rate=4e-3,
        batch_size=4,
        out=out,
    )
    result = run.fit(rounds=rounds)
    losses = [loss for loss in result.history["heldout_loss"] if loss is not None]
    print(f"held-out loss: {losses[0]:.3f} before, {losses[-1]:.3f} after {rounds} rounds")
    print(f"answer: {result.answer(PROMPT.format(question=EXAMPLE_QUESTION))}")
    result.save_adapter(out / "saved")
    assert ff.verify(out).ok


def loop(path: str, rows: Path, steps: int) -> None:
    """One client by hand; the estimate and the step are all there is to the method."""
    model = ff.LoraModel.from_pretrained(path, rank=8)
    data = ff.Dataset.from_file(rows, prompt=PROMPT, answer=ANSWER, heldout=0.05)
    batches, mu, rate = data.batches(model, batch_size=8), 1e-2, 4e-3
    for step in range(steps):
        batch, z = batches[step], ff.Steps.of([step], [1.0])
        plus, minus = model.evaluate(
            [ff.Probe(batch, perturbation=sign * mu * z) for sign in (1, -1)]
        )
        gradient = (plus.mean - minus.mean) / (2 * mu)
        model.apply(-rate * gradient * z)
    (before,) = model.evaluate([ff.Probe(batches[0])])
    print(f"loss of one batch after {steps} steps by hand: {before.mean:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(files("fedforward.demo").joinpath("model")))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="run directory; a temporary one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        examples = site_examples(seed=0, per_site=100)
        rows.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
        out = arguments.out or Path(scratch) / "run"
        federation(arguments.model, rows, out, arguments.rounds)
        loop(arguments.model, rows, arguments.steps)


if __name__ == "__main__":
    main()
