"""Ops that start from hidden states: the lm_head in chunks of rows."""
