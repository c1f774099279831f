"""Use fedforward as a library: one client tunes the demonstration model with its own loop.

    python examples/library_use.py [--model FOLDER]

The loop is centralised MeZO in ten lines: probe at +mu and -mu, turn the difference into a step,
commit. Nothing here needs a server; `fedforward.training.run.Run` is the federated
counterpart.
"""

import argparse
import json
from importlib.resources import files

from fedforward import Probe, Steps, Update
from fedforward.core.seeds import direction_seed, dither_seed
from fedforward.core.steps import NO_STEPS, ProbePlan
from fedforward.data.sampler import Batches
from fedforward.data.templates import tokenise
from fedforward.demo.text import ANSWER, PROMPT, site_examples
from fedforward.methods.estimators import TwoPoint
from fedforward.models.loading import load
from fedforward.models.lora import LoraModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(files("fedforward.demo").joinpath("model")))
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    estimator, rate = TwoPoint(directions=1, mu=1e-2), 4e-3

    network, tokenizer = load(arguments.model, "float32", "cpu")
    plan = ProbePlan(probes_per_call=2, threads=2, trajectory="recompute", evaluation_rows=8)
    model = LoraModel(network, rank=8, alpha=16, plan=plan)
    rows = site_examples(seed=0, per_site=100)
    tokens = tokenise(rows, tokenizer, prompt=PROMPT, answer=ANSWER, sequence_length=128)
    batches = Batches(tokens.examples, batch_size=8, run_seed=0, client=0)

    for step in range(arguments.steps):
        seed = direction_seed(0, step, 0, 0, 0)
        direction = Steps.of([seed], [1.0])
        evaluations = model.evaluate(estimator.probes(batches[step], NO_STEPS, [direction]))
        (gradient,), loss = estimator.gradients(evaluations)
        model.commit([Update(Steps.of([seed], [-rate * gradient]), dither_seed(0, step))])
        if step % 50 == 0 or step == arguments.steps - 1:
            print(json.dumps({"step": step, "training_loss": round(loss, 3)}))

    (evaluation,) = model.evaluate([Probe(batches[0])])
    print(f"loss of one batch at the end: {evaluation.mean:.3f}")


if __name__ == "__main__":
    main()
