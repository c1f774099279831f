"""Memory of a step: measured (`tracker`, `calibrate`) and predicted (`model`)."""
