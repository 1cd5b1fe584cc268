"""Device functions that the kernels share: GELU, its derivative, and the bits around them.

    Phi(x) = P(X <= x) of the standard normal; GELU(x) = x Phi(x); GELU'(x) = Phi(x) + x phi(x)

Phi is computed as one exponential of one polynomial, Phi(-a) = 2^p(a) for a >= 0: eight FMAs, an
EX2 and a select, no branch and no division, against some thirty instructions of a library erff. p
is a minimax fit of log2 Phi(-a) on [0, 5.6], weighted so that x Phi(x) is even in error; its
leading coefficient is negative, so that it falls to -inf beyond. In float32 the error is 5.1e-8 in
Phi and 4.3e-8 in GELU, at any x: below that of 0.5 (1 + erff(x / sqrt 2)).

All arguments are float32 blocks; kernels convert right after a load and right before a store.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal_cdf(x):
    """Phi(x)."""
    a = tl.abs(x)
    p = a * -2.270439381391043e-06 + 3.2907966669881716e-05
    p = p * a - 1.570171007188037e-04
    p = p * a - 2.0305351063143462e-04
    p = p * a + 7.143455557525158e-03
    p = p * a - 5.2546847611665726e-02
    p = p * a - 0.4591929316520691
    p = p * a - 1.1511069536209106
    p = p * a - 0.9999999403953552
    tail = tl.exp2(p)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def gelu(x):
    """x Phi(x)."""
    return x * normal_cdf(x)


@triton.jit
def gelu_gradient(x):
    """Phi(x) + x phi(x), phi(x) = 2^(-x^2 log2(e)/2 + log2(1/sqrt(2 pi)))."""
    density = tl.exp2(x * x * -0.7213475204444817 - 1.3257480647361592)
    return normal_cdf(x) + x * density


@triton.jit
def activate(x, GELU: tl.constexpr):
    """GELU(x), or x."""
    if GELU:
        x = gelu(x)
    return x


@triton.jit
def scaled(dy, x, GELU: tl.constexpr):
    """dy times the derivative of `activate` at x."""
    if GELU:
        dy = dy * gelu_gradient(x)
    return dy


@triton.jit
def load_parameter(p_param, o_c, m_c, default, PRESENT: tl.constexpr):
    """A per-channel parameter in float32; `default` where it is absent."""
    if PRESENT:
        b_param = tl.load(p_param + o_c, mask=m_c, other=0.0).to(tl.float32)
    else:
        b_param = tl.full(o_c.shape, default, tl.float32)
    return b_param
