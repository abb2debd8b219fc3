"""Adapters to host trainers, one file per host."""
