"""Policy objectives: shapes, metrics, normalisers, checks and results."""
