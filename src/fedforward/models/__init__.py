"""Implementations of `ForwardModel`: the quadratic for theory, causal language models for work."""
