"""The policy objective: its shapes, metrics, normalisers, checks and results."""
