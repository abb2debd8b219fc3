"""Device helpers and constants that several kernels use.

The interpreter (TRITON_INTERPRET=1) represents bfloat16 by a 16-bit integer. It multiplies and
compares these integers, and a store truncates, while a GPU rounds to nearest even. So every load is
followed by `.to(tl.float32)`, `tl.dot` gets float32 under `INTERPRET`, and `store` rounds
explicitly in the interpreter. Compiled kernels contain no code for this.
"""

import os

import triton
import triton.language as tl

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y"))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
# 2^-126 is the smallest normal float32. expm1_2 builds such a power from the bits of its exponent.
MIN_EXPONENT = tl.constexpr(-126.0)
# Triton 3.6 accepts a plain string as an argument, but not as a default value.
NO_HINT = tl.constexpr("")


@triton.jit
def maximum(a, b):
    """Return max(a, b), or NaN if either is NaN. A plain maximum would hide the NaN of a row."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal(x):
    """Return 1 / x within 1 ulp, in one instruction (a division takes eight); 0 for infinity.

    x and 1 / x must not be subnormal, because the instruction treats a subnormal as 0.
    """
    if INTERPRET:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def log2_near_1(x):
    """Return log2 of x in [1e-38, 2] in one instruction; absolute error 2^-22 + 2^-22 of the value.

    `tl.log2` takes 25 instructions. log2(1) is exactly 0.
    """
    if INTERPRET:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def expm1_2(x):
    """Return 2^x - 1 for x in [-126, 0]; relative error <= 4e-7. tl.exp2(x) - 1 cancels near 0."""
    return power_split(x)[1]


@triton.jit
def power_split(x):
    """Return (2^x, 2^x - 1) for x in [-126, 0], each with a relative error <= 4e-7."""
    k = tl.floor(x + 0.5)
    r = x - k
    p = 1.326472731307149e-3 * r + 9.671512991189957e-3
    p = ((p * r + 5.550733581185341e-2) * r + 0.24022242426872253) * r + 0.6931470036506653
    scale = ((k.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    rest = p * r
    return rest * scale + scale, rest * scale + (scale - 1.0)


@triton.jit
def log1p(y):
    """Return ln(1 + y) for finite y > -1; relative error <= 3e-7."""
    return log_split(1.0 + y, y)


@triton.jit
def log_split(t, y):
    """Return ln t for finite t = 1 + y > 0; relative error <= 3e-7. The polynomial is from Cephes logf.

    y is exact near t = 1, and t is exact near 0. The hardware logarithm has an absolute error of 2^-22,
    which is too large for a result near 0.
    """
    bits = t.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
    k = bits >> 23
    reduced = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(k == 0, y, reduced)
    q = f * f
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = ((p * f + 1.1676998740e-1) * f - 1.2420140846e-1) * f + 1.4249322787e-1
    p = ((p * f - 1.6668057665e-1) * f + 2.0000714765e-1) * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    return k.to(tl.float32) * LN_2 + (f - q * (0.5 - f * p))


@triton.jit
def load(pointers, mask=None, other=None, EVICTION: tl.constexpr = NO_HINT):
    """Load values of any dtype as float32."""
    if mask is None:
        x = tl.load(pointers, eviction_policy=EVICTION)
    else:
        x = tl.load(pointers, mask=mask, other=other, eviction_policy=EVICTION)
    return x.to(tl.float32)


@triton.jit
def store(pointers, x, mask=None, EVICTION: tl.constexpr = NO_HINT):
    """Store float32 `x` in the dtype of the pointers, rounded once to nearest even."""
    element: tl.constexpr = pointers.dtype.element_ty
    if INTERPRET and element == tl.bfloat16:
        word = x.to(tl.int32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)  # the carry could turn a NaN into an infinity
        tl.store(pointers.to(tl.pointer_type(tl.int16)), rounded.to(tl.int16), mask=mask)
    else:
        tl.store(pointers, x.to(element), mask=mask, eviction_policy=EVICTION)
