"""Benchmarks: `python -m benchmarks` measures and prints, `python -m benchmarks report` draws. See README
of the project.
"""
