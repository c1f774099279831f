"""FedMeZO: zeroth-order federated averaging (arXiv 2402.05926), and MeZO as its one-client case.

Faithful to the paper: two-point estimate along z ~ N(0, I_d), H local steps on the client's own
trajectory, weighted average of the clients, dropout off. It departs in what travels: the paper's
code uploads LoRA tensors; the same update is the H projected gradients (`docs/architecture.md`),
and averaging parameters is averaging steps:

    Σ_i p_i θ_i  =  θ - Σ_i Σ_h p_i η_i g_ih z(s_ih)        because Σ_i p_i = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedforward.estimators import two_point_gradients, two_point_probes
from fedforward.messages import Contribution, Report, Task
from fedforward.methods import BatchStream, LocalRound, Returned
from fedforward.seeds import direction_seed
from fedforward.steps import NO_STEPS, Steps


@dataclass(frozen=True)
class FedMeZO:
    """The algorithm with its settings.

    Attributes:
        local_steps: H.
        directions: n, directions averaged in each step (the paper has 1).
        mu: μ, the perturbation scale.
    """

    local_steps: int
    directions: int
    mu: float
    name: str = "fedmezo"

    def local_round(self, task: Task, batches: BatchStream, run_seed: int) -> LocalRound:
        """θ_{h+1} = θ_h - (η_i / n) Σ_d g_hd z_hd for h < H; the report carries g."""
        trajectory = NO_STEPS
        gradients: list[float] = []
        losses: list[float] = []
        skipped = 0
        for step in range(self.local_steps):
            batch = batches[task.round * self.local_steps + step]
            seeds = [
                direction_seed(run_seed, task.round, task.client, step, direction)
                for direction in range(self.directions)
            ]
            evaluations = yield two_point_probes(batch, trajectory, seeds, self.mu)
            projected, loss = two_point_gradients(evaluations, self.mu)
            if np.isfinite(projected).all():
                losses.append(loss)
            else:
                projected = np.zeros_like(projected)
                skipped += 1
            coefficients = -task.learning_rate / self.directions * projected.astype(np.float64)
            trajectory = trajectory + Steps.of(seeds, coefficients)
            gradients.extend(projected.tolist())
        return Report(
            round=task.round,
            client=task.client,
            examples=len(batches),
            loss=float(np.mean(losses)) if losses else float("nan"),
            skipped=skipped,
            gradients=np.array(gradients, np.float32),
        )

    def aggregate(self, returned: Sequence[Returned]) -> tuple[Contribution, ...]:
        """-p_i (η_i / n) g_ih, computed in float64 and rounded to float32 once."""
        contributions = []
        for part in returned:
            rate = -part.weight * (part.learning_rate / self.directions)
            # What float32 cannot hold becomes infinite here, and the ledger refuses it.
            with np.errstate(over="ignore"):
                coefficients = rate * part.report.gradients.astype(np.float64)
                rounded = coefficients.astype(np.float32)
            contributions.append(Contribution(part.report.client, rounded))
        return tuple(contributions)
