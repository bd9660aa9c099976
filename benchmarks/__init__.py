"""Benchmarks of the engine: README.md tells what they measure and how to compare."""
