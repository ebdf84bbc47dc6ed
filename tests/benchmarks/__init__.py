"""Benchmarks: programs to run by hand (`make bench`), never timed tests.

Every figure is a ratio against its floor or peer, measured in the same process, interleaved, median of at least five.
"""
