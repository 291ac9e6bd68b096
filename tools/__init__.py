"""Demonstration, benchmarks and drills: run from a checkout with `python -m tools.NAME`, not installed."""
