"""The specification: every op in plain torch, in any float dtype including float64."""
