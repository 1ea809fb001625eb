"""Ratios against what a user would otherwise run, measured side by side in one process. ``python -m benchmarks``."""
