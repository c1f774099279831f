"""NVIDIA FLARE as an engine; `runtime` is its entry point."""
