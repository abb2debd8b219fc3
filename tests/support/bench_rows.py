"""Benchmark rows for tests."""

from tokfuse.bench.row import SCHEMA_VERSION, Row


def our_row(op: str, mode: str, variant: str, shape: str, **fields: object) -> Row:
    """Return a tokfuse row that passed on the CPU in float32; `fields` replace or add fields.

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
