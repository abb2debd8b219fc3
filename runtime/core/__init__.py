"""Dispatch, capability records, checks, errors, ranges: what every other room builds on."""
