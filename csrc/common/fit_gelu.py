"""Fits the constants of `normal_tail` in math.h; run it to print them (needs NumPy and SciPy).

    Phi(-a) = E t P(t),   E = exp(-a^2 / 2),   t = 1 / (1 + p a),   0 <= a <= 13
    2^f     = R(f),       |f| <= 1/2

P is the weighted minimax polynomial: the error that it leaves in Phi(-a) is below 2^-25, that in
GELU(-a) = -a Phi(-a) below 2^-26 max(1, a), and that relative to Phi(-a) below 4e-6 throughout. R
is the minimax polynomial in relative error with R(0) = 1. Both are linear programs on Chebyshev
nodes.
"""

import numpy as np
from scipy.optimize import linprog
from scipy.special import erfcx, ndtr

SLOPE = 0.346  # p: the best of a scan in steps of 0.001 at this degree
TAIL_DEGREE = 6
EXP2_DEGREE = 5
LARGEST = 13.0


def nodes(low, high, count=1200):
    angles = np.pi * (np.arange(count) + 0.5) / count
    return (low + high) / 2 + (high - low) / 2 * np.cos(angles)


def minimax(x, y, tolerance, powers):
    """Coefficients c that minimise max |sum_k c_k x^powers_k - y| / tolerance, and that maximum."""
    basis = x[:, None] ** np.asarray(powers) / tolerance[:, None]
    target = y / tolerance
    bound = -np.ones((len(x), 1))
    rows = np.block([[basis, bound], [-basis, bound]])
    cost = np.zeros(len(powers) + 1)
    cost[-1] = 1
    limits = [(None, None)] * len(powers) + [(0, None)]
    solution = linprog(cost, rows, np.concatenate([target, -target]), bounds=limits)
    return solution.x[:-1], solution.x[-1]


def fit_tail(slope=SLOPE, degree=TAIL_DEGREE):
    t = nodes(1 / (1 + slope * LARGEST), 1.0)
    a = (1 / t - 1) / slope
    y = erfcx(a / np.sqrt(2)) / 2 / t
    absolute = 2.0**-25 * np.minimum(1, np.maximum(1, a) / (2 * a))
    relative = np.minimum(absolute / ndtr(-a), 4e-6)
    return minimax(t, y, relative * y, range(degree + 1))


def fit_exp2(degree=EXP2_DEGREE):
    f = nodes(-0.5, 0.5)
    y = 2.0**f
    return minimax(f, y - 1, y, range(1, degree + 1))


if __name__ == "__main__":
    tail, error = fit_tail()
    print(f"P: {error:.3f} of the tolerance;", ", ".join(f"{c:.9e}f" for c in tail))
    exp2, error = fit_exp2()
    print(f"R: relative error {error:.2e};", ", ".join(f"{c:.9e}f" for c in exp2))
