"""Rows of the benchmark for the tests that read them."""

from tokfuse.bench.row import SCHEMA_VERSION, Row


def our_row(op: str, mode: str, variant: str, shape: str, **fields: object) -> Row:
    """A row of ours that passed on the CPU in float32; `fields` replace or add.

    shape: "tokens x vocab" or "tokens x hidden x vocab", without spaces.
    """
    tokens, *hidden, vocab = map(int, shape.split("x"))
    given = {
        "dtype": "float32",
        "device": "cpu",
        "provider": "tokfuse",
        "role": "ours",
        "backend": "cpu",
        "status": "pass",
    } | fields
    return Row(
        schema=SCHEMA_VERSION,
        op=op,
        mode=mode,
        variant=variant,
        shape=shape,
        tokens=tokens,
        hidden=hidden[0] if hidden else 0,
        vocab=vocab,
        **given,
    )
