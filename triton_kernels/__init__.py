"""Triton kernels and their launchers. Modules here import torch, triton and this package only."""
