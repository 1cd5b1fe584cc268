"""Fits the constants of math.h; run it to print them (needs NumPy and SciPy). With a = |x|:

    P   Phi(-a) = E t P(t),  E = exp(-a^2 / 2),  t = 1 / (1 + p a)     0 <= a <= 13.4, relative
    R   exp(-f / 2)                                                    |f| <= ln 2,    relative
    p   log2 Phi(-a)                                                   0 <= a <= 10,   absolute
    2^  2^f                                                            |f| <= 1/2,     relative
    h   phi(a) / Phi(-a)                                               0 <= a <= 10,   relative

and of gelu.cuh, for bf16 (degrees 5 and 2) and fp16 (7 and 3):

    q   log2 Phi(-a)                                                   0 <= a <= 6,    absolute
    m   Phi(-a) / phi(a) = t m(t),  t = 1 / (1 + s a)                  0 <= a <= 13,
        relative to |Phi(-a) / phi(a) - a| or 0.1, whichever is larger

Each is the minimax polynomial of its degree: a linear program on Chebyshev nodes. Above 10 the
polynomial p keeps falling (-134 at 13.4), so that 2^p ends at 0 there.
"""

import numpy as np
from scipy.optimize import linprog
from scipy.special import erfcx, log_ndtr

SLOPE = 0.305  # p of t: the best of a scan in steps of 0.005 at this degree
LARGEST = 13.4
SHORT_LARGEST = 10.0
GPU_TAIL_LARGEST, GPU_SLOPE_LARGEST = 6.0, 13.0
GPU_SLOPES = {2: 0.35, 3: 0.45}  # s by degree: the best of a scan in steps of 0.025


def nodes(low, high, count=1500):
    angles = np.pi * (np.arange(count) + 0.5) / count
    return (low + high) / 2 + (high - low) / 2 * np.cos(angles)


def minimax(x, y, tolerance, degree):
    """Coefficients c that minimise max |sum_k c_k x^k - y| / tolerance, and that maximum."""
    basis = x[:, None] ** np.arange(degree + 1) / tolerance[:, None]
    target = y / tolerance
    bound = -np.ones((len(x), 1))
    rows = np.block([[basis, bound], [-basis, bound]])
    cost = np.zeros(degree + 2)
    cost[-1] = 1
    limits = [(None, None)] * (degree + 1) + [(0, None)]
    solution = linprog(cost, rows, np.concatenate([target, -target]), bounds=limits)
    return solution.x[:-1], solution.x[-1]


def fit_tail(slope=SLOPE, degree=7):
    t = nodes(1 / (1 + slope * LARGEST), 1.0)
    y = erfcx((1 / t - 1) / slope / np.sqrt(2)) / 2 / t
    return minimax(t, y, y, degree)


def fit_exponential(degree=5):
    largest = 1.001 * np.log(2)
    f = nodes(-largest, largest)
    y = np.exp(-f / 2)
    return minimax(f, y, y, degree)


def fit_short_tail(degree=8):
    a = nodes(0, SHORT_LARGEST)
    y = log_ndtr(-a) / np.log(2)
    return minimax(a, y, np.full_like(a, 1 / np.log(2)), degree)


def fit_short_exp2(degree=4):
    f = nodes(-0.5, 0.5)
    return minimax(f, 2.0**f, 2.0**f, degree)


def fit_hazard(degree=6):
    a = nodes(0, SHORT_LARGEST)
    y = np.exp(-a * a / 2 - log_ndtr(-a)) / np.sqrt(2 * np.pi)
    return minimax(a, y, y, degree)


def fit_gpu_tail(degree):
    a = nodes(0, GPU_TAIL_LARGEST)
    y = log_ndtr(-a) / np.log(2)
    return minimax(a, y, np.full_like(a, 1 / np.log(2)), degree)


def fit_gpu_slope(degree):
    a = nodes(0, GPU_SLOPE_LARGEST)
    t = 1 / (1 + GPU_SLOPES[degree] * a)
    ratio = np.sqrt(np.pi / 2) * erfcx(a / np.sqrt(2))
    return minimax(t, ratio / t, np.maximum(np.abs(ratio - a), 0.1) / t, degree)


if __name__ == "__main__":
    fits = {
        "P": fit_tail, "R": fit_exponential, "p": fit_short_tail, "2^": fit_short_exp2,
        "h": fit_hazard, "q of bf16": lambda: fit_gpu_tail(5), "q of fp16": lambda: fit_gpu_tail(7),
        "m of bf16": lambda: fit_gpu_slope(2), "m of fp16": lambda: fit_gpu_slope(3),
    }  # fmt: skip
    for name, fit in fits.items():
        coefficients, error = fit()
        print(f"{name}: error {error:.2e};", ", ".join(f"{c:.9e}f" for c in coefficients))
