"""Memory of a step: measured, and predicted from a calibrated model."""
