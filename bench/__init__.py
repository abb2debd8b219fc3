"""Benchmarks: cases, peers and result rows."""
