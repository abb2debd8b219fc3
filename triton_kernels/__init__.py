"""Triton device code and launchers; imports torch, triton and this folder only."""
