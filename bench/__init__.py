"""Benchmarks: a speed is a ratio to its baseline, measured in the same run. `bench/LOG.md` keeps what did not help."""
