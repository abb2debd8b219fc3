"""The base of the runtime: dispatch, capability records, checks, errors and profiler ranges."""
