"""What a run will need before it runs: how probes are grouped, and how much memory they take."""
