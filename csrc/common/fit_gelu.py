"""Fits the constants of GELU; run it to print them (needs NumPy and SciPy). With a = |x|:

of gelu.h, and of mills_ratio.h, which it writes (`make format` then):

    q   exp(-f / 2) = 1 + f q(f)                                       |f| <= ln 2,    relative
    R   Phi(-a) / exp(-a^2 / 2), around 16 or 8 centres               0 <= a <= 13.4, relative
    p   log2 Phi(-a)                                                   0 <= a <= 10,   absolute
    2^  2^f                                                            |f| <= 1/2,     relative
    h   phi(a) / Phi(-a)                                               0 <= a <= 10,   relative

of gelu.cuh, for float32:

    P   Phi(-a) = E t P(t),  E = exp(-a^2 / 2),  t = 1 / (1 + p a)     0 <= a <= 13.4, relative
    E   exp(-f / 2)                                                    |f| <= ln 2,    relative

and for bf16 (degrees 5 and 2) and fp16 (7 and 3):

    q   log2 Phi(-a)                                                   0 <= a <= 6,    absolute
    m   Phi(-a) / phi(a) = t m(t),  t = 1 / (1 + s a)                  0 <= a <= 13,
        relative to |Phi(-a) / phi(a) - a| or 0.1, whichever is larger

Each is the minimax polynomial of its degree, on Chebyshev nodes. Above 10 the
polynomial p keeps falling (-134 at 13.4), so that 2^p ends at 0 there.
"""

from pathlib import Path

import numpy as np
from scipy.optimize import linprog
from scipy.special import erfcx, log_ndtr

SLOPE = 0.305  # p of t: the best of a scan in steps of 0.005 at this degree
LARGEST = 13.4
# By the number of centres: the degree, and k. The interval of a is told by the exponent of 1 + k a,
# which must stay below 16, and the first bits of its mantissa.
MILLS = {16: (6, 1.0), 8: (7, 1.118)}
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


def fine_minimax(x, y, tolerance, degree):
    """The same without a constant, for fits below the linear program's own tolerance of 1e-7:
    Lawson's iteration of weighted least squares."""
    half = np.abs(x).max()
    powers = np.arange(1, degree + 1)
    basis, target = (x[:, None] / half) ** powers / tolerance[:, None], y / tolerance
    weights = np.ones_like(x)
    for _ in range(100):
        root = np.sqrt(weights)
        c, *_ = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)
        error = np.abs(basis @ c - target)
        weights *= error / error.max() + 1e-3
    return c / half**powers, error.max()


def mills_ratio(a):
    return erfcx(a / np.sqrt(2)) / 2


def fit_mills(low, high, degree):
    """The centre, the coefficients around it and the relative error."""
    middle = np.float32((low + high) / 2)
    # Of the floats near the middle that where R is closest to a float itself.
    floats = middle + np.arange(-200, 200, dtype=np.float32) * np.spacing(middle)
    off = np.abs(
        np.float32(mills_ratio(floats.astype(float))) / mills_ratio(floats.astype(float)) - 1
    )
    centre = float(floats[off.argmin()])
    constant = float(np.float32(mills_ratio(centre)))
    a = nodes(low, min(high, LARGEST), 100)
    y = mills_ratio(a)
    coefficients, error = fine_minimax(a - centre, y - constant, y, degree)
    return [centre, constant, *coefficients], error


def fit_all_mills(centres):
    """Rows of `centres` numbers: the centres, then each coefficient; and the largest error."""
    degree, slope = MILLS[centres]
    parts = centres // 4
    columns, errors = [None] * centres, []
    for exponent in range(4):
        for part in range(parts):
            low, high = (
                (2.0**exponent * (1 + edge / parts) - 1) / slope for edge in (part, part + 1)
            )
            # The biased exponent is 127 and more: its last two bits are those of exponent - 1.
            column, error = fit_mills(low, high, degree)
            columns[(exponent - 1) % 4 * parts + part] = column
            errors.append(error)
    return np.array(columns).T, max(errors)


def fit_expm1(degree=6):
    largest = 1.001 * np.log(2)
    f = nodes(-largest, largest, 100)
    return fine_minimax(f, np.expm1(-f / 2), np.exp(-f / 2), degree)


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


def write_mills_header(path):
    lines = [
        "// Phi(-a) / exp(-a^2 / 2) for 0 <= a <= 13.4, by polynomials around centres (gelu.h).",
        "// Written by fit_gelu.py.",
        "#pragma once",
        "",
        "namespace convnest::CONVNEST_ISA {",
        "namespace {",
        "",
        "template <int kCentres>",
        "struct MillsRatio;",
    ]
    for centres, (degree, slope) in MILLS.items():
        table, error = fit_all_mills(centres)
        lines += [
            "",
            f"// relative error {error:.1e}",
            "template <>",
            f"struct MillsRatio<{centres}> {{",
            f"static constexpr int kDegree = {degree};",
            f"static constexpr int kMantissaBits = {round(np.log2(centres / 4))};",
            f"static constexpr float kSlope = {slope}f;",
            f"alignas(64) static constexpr float kCentre[{centres}] = {{{numbers(table[0])}}};",
            f"alignas(64) static constexpr float kCoefficients[{degree + 1}][{centres}] = {{",
            *(f"{{{numbers(row)}}}," for row in table[1:]),
            "};",
            "};",
        ]
    path.write_text(
        "\n".join([*lines, "", "}  // namespace", "}  // namespace convnest::CONVNEST_ISA", ""])
    )


def numbers(values):
    return ", ".join(f"{value:.9e}f" for value in values)


if __name__ == "__main__":
    fits = {
        "q": fit_expm1, "P": fit_tail, "E": fit_exponential,
        "p": fit_short_tail, "2^": fit_short_exp2, "h": fit_hazard,
        "q of bf16": lambda: fit_gpu_tail(5), "q of fp16": lambda: fit_gpu_tail(7),
        "m of bf16": lambda: fit_gpu_slope(2), "m of fp16": lambda: fit_gpu_slope(3),
    }  # fmt: skip
    for name, fit in fits.items():
        coefficients, error = fit()
        print(f"{name}: error {error:.2e};", numbers(coefficients))
    write_mills_header(Path(__file__).with_name("mills_ratio.h"))
