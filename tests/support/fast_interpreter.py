"""Make Triton's interpreter three times faster for tests.

At every call of a device function, including tl.max and tl.sum, the interpreter replaces about 500
functions of `triton.language` by its own. This takes 10 ms, 70% of the time of a row kernel. The
replacements are already active from the launch on, so one replacement per launch is enough.

It also accepts the masks that only the interpreter of Triton 3.9 refuses, and loop bounds that the interpreter of
Triton 3.6 cannot read with numpy 2.4 or newer.
"""

from typing import Any

from triton.runtime import interpreter


def install() -> None:
    """Replace the interpreter's hooks. Every launch still starts with the complete replacement."""
    replace = interpreter._patch_lang
    tl = interpreter.tl
    replaced: set[int] = set()

    def once(function: Any) -> Any:
        seen = {id(x) for x in function.__globals__.values() if x is tl or x is tl.core}
        if seen <= replaced:
            return interpreter._LangPatchScope()
        scope = replace(function)
        if not replaced:  # this call is the launch, which restores the functions at its end
            restore = scope.restore

            def restore_all() -> None:
                replaced.clear()
                restore()

            scope.restore = restore_all
        replaced.update(seen)
        return scope

    interpreter._patch_lang = once
    _read_any_scalar()
    _accept_any_mask(interpreter.InterpreterBuilder)


def _read_any_scalar() -> None:
    """Read an integer from an array of one element, which numpy 2.4 no longer converts by `int`."""
    plain = interpreter._patch_lang_tensor

    def replaced(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = replaced


def _accept_any_mask(builder: type) -> None:
    """Convert masks to bool.

    In the interpreter, a comparison has the dtype of its operands, and so has a mask that joins a comparison of
    scalars with a block. The compiler knows no such difference, but the interpreter of Triton 3.9 refuses these masks.
    """

    def converted(name: str, place: int) -> None:
        plain = getattr(builder, name)

        def access(self: Any, *arguments: Any) -> Any:
            mask = arguments[place]
            if mask.data.dtype != bool:
                mask = interpreter.TensorHandle(mask.data.astype(bool), interpreter.tl.int1)
            return plain(self, *arguments[:place], mask, *arguments[place + 1 :])

        setattr(builder, name, access)

    converted("create_masked_load", 1)
    converted("create_masked_store", 2)
