"""The parts of `examples/train_grpo.py`, one short module per part."""
