"""Benchmarks: cases, peers, rows."""
