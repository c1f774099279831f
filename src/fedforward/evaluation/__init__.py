"""Objectives and metrics, and the held-out evaluation."""
