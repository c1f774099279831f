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

How it is solved:
- Lines below each block's part of f₁ (tangents, and chords where no coverage is possible) make a
  linear program, which HiGHS solves (`program`). Its dual values are prices of coverage, and any
  prices give a lower bound for the integer problem: the certificate.
- What is whole in its solution is improved by exchanges of blocks (`exchange`). With equal shares,
  and to each client blocks of equal cost, all of it is whole and f₁ is proven least.
- If value and bound do not meet and the problem is small, a mixed-integer program over the same
  lines closes the gap.
The gaps that remain are reported.
"""

from fedforward.planning.activation.pareto import pareto, solve
from fedforward.planning.activation.problem import SAME, UNLIMITED, Activation, Objective, Problem

__all__ = ["SAME", "UNLIMITED", "Activation", "Objective", "Problem", "pareto", "solve"]
