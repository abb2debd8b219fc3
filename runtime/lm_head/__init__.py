"""Ops that start from hidden states: the lm_head, computed in chunks of rows."""
