"""What a step costs and who perturbs which blocks, decided before a run."""
