"""Which blocks of the model each client perturbs: heterogeneous block activation after ZorBA.

Of ZorBA (arXiv 2603.04436) only the abstract was available, which names the decision, its trade-off
between convergence and memory, and an ε-constraint lexicographic algorithm. The formulation here is
our own. Nothing in this package needs PyTorch.

With N clients, L blocks and the matrix A ∈ {0,1}^{N×L}, client i of share p_i and block b of weight
w_b and dimension d_b, the surrogate of slow convergence is

    f₁(A) = Σ_b w_b / c_b + λ Σ_i p_i (Σ_b A_ib d_b) / Σ_b d_b,    c_b = Σ_i A_ib p_i.

The variance of a block's update falls with its coverage c_b; the second term rises with the
dimension that a client perturbs. It equals λ Σ_b c_b d_b / Σ_b d_b, so that f₁ is a sum of convex
functions of one coverage each. Every block is active on some client, and fixed_i + Σ_b A_ib cost_ib
never exceeds client i's budget. First f₁ is made least, then the memory subject to
f₁ ≤ (1 + ε) min f₁.

What is exact, and what is certified:
- Equal shares and clients whose blocks cost the same: f₁ is separable and convex over the integer
  points of a polymatroid (Gale and Ryser), which decomposition solves exactly (`exact`).
- Otherwise the continuous relaxation gives prices of coverage, and any prices give a lower bound
  for the integer problem (`relaxation`); rounding and exchanges of blocks give a matrix
  (`exchange`). The two meet closely when clients are many.
- If they do not and the problem is small, a mixed-integer program closes the gap (`program`).
The gaps that remain are reported.
"""

from fedforward.planning.activation.problem import SAME, UNLIMITED, Activation, Objective, Problem
from fedforward.planning.activation.stages import pareto, solve

__all__ = ["SAME", "UNLIMITED", "Activation", "Objective", "Problem", "pareto", "solve"]
