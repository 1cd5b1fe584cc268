"""Shared-memory accesses of the tensor-core kernels are free of bank conflicts: an address model.

A wavefront serves 32 banks of 4 bytes; accesses of 8 bytes go by half-warps, of 16 by quarters.
The addresses are those of csrc/common/planes.cuh, band.cuh, depthwise_wgrad.cuh, of
pair_planes.cuh, which nested_conv's backward in two wide kernels uses, of small_map.cuh, and at the
end of the kernels on the FMA units, depthwise_fma.cuh and depthwise_fma_wgrad.cuh.
"""

from __future__ import annotations

import pytest

PLANE = 20 * 16
ROW = 16 * PLANE


def wavefronts(addresses: list[int | None], size: int) -> int:
    lanes = 32 // max(size // 4, 1)
    total = 0
    for first in range(0, 32, lanes):
        words: dict[int, set[int]] = {}
        for address in addresses[first : first + lanes]:
            for word in range(address // 4, (address + size) // 4) if address is not None else ():
                words.setdefault(word % 32, set()).add(word)
        total += max(map(len, words.values()), default=0)
    return total


def plane_of(channel: int) -> int:
    return (channel & 7) * 2 + (channel >> 3)


def roles(warp: int) -> list[tuple[int, int, int]]:
    """Half, quad and row of the warp's threads."""
    return [(t & 1, t >> 1 & 31, t >> 6) for t in range(warp * 32, warp * 32 + 32)]


@pytest.mark.parametrize("warp", range(8))
def test_fill_and_drain(warp):
    for i in range(8):
        cells = [r * ROW + (2 * i + o) * PLANE + q * 8 for o, q, r in roles(warp)]
        assert wavefronts(cells, 8) == 2
        gradient = [
            None if q == 0 else a - 8 for a, (_, q, _) in zip(cells, roles(warp), strict=True)
        ]
        assert wavefronts(gradient, 8) == 2


@pytest.mark.parametrize("channel", range(16))
def test_matrix_loads_and_output_stores(channel):
    base = plane_of(channel) * PLANE
    window = [base + ((n & 7) + (n >> 3 & 1) * 8 + (n >> 4)) * 16 for n in range(32)]
    transposed = [base + ((n & 7) + (n >> 4) * 8 + (n >> 3 & 1)) * 16 for n in range(32)]
    gradient = [(n >> 4) * ROW + base + ((n & 7) + (n >> 3 & 1) * 8) * 16 for n in range(32)]
    for addresses in (window, transposed, gradient):
        assert wavefronts(addresses, 16) == 4
    assert wavefronts([base + 8 + n * 4 for n in range(32)], 4) == 1


@pytest.mark.parametrize("size", [3, 5, 7, 9])
def test_band_loads(size):
    offset = 4 - size // 2
    shift = (7 + offset + 1) // 2 * 2
    row_words = (15 - offset + shift + 1) // 2 + 1
    stride = max(row_words - shift // 2, (size + shift) // 2 + 1)
    copy_words = ((16 * size - 1) * stride + row_words + 15) // 32 * 32 + 16
    for row in range(16 * size):
        for half in (0, 4):
            words = []
            for lane in range(32):
                e = 2 * (lane & 3) - (lane >> 2) - offset
                word = (e & 1) * copy_words + row * stride + (e + shift + (e & 1)) // 2 + half
                assert 0 <= word - (e & 1) * copy_words - row * stride < row_words
                words.append(word * 4)
            assert wavefronts(words, 4) == 1


def test_thread_private_vectors():
    """The shortcut's ring and the staging: 16 bytes, neighbouring threads side by side."""
    assert wavefronts([lane * 16 for lane in range(32)], 16) == 4


PAIR_PLANE = 17 * 16
PAIR_HALF = 8 * PAIR_PLANE + 64
PAIR_ROW = PAIR_HALF + 8 * PAIR_PLANE


def pair_plane(channel: int) -> int:
    return (channel >> 3) * PAIR_HALF + (channel & 7) * PAIR_PLANE


@pytest.mark.parametrize("lead", [4, 8])
@pytest.mark.parametrize("warp", range(16))
def test_pairs_fill_and_drain(warp, lead):
    threads = range(warp * 32, warp * 32 + 32)
    roles = [(t & 1, t >> 1 & 63, t >> 7) for t in threads]  # half, pair, row
    written = set()
    for i in range(8):
        cells = [
            r * PAIR_ROW + o * PAIR_HALF + i * PAIR_PLANE + p * 4 + (lead - 4) * 2
            for o, p, r in roles
        ]
        assert wavefronts(cells, 4) == 1
        assert all(cell % PAIR_ROW < PAIR_ROW - 3 for cell in cells)
        written.update(cells)
    assert len(written) == 8 * 32
    # The mask's two planes are not: 16 words of each overlap in 10 banks.
    masks = [o * PAIR_PLANE + p * 4 + o * 8 for o, p, _ in roles]
    assert wavefronts(masks, 4) == 2


@pytest.mark.parametrize("channel", range(16))
def test_matrix_loads_of_pair_planes(channel):
    base = pair_plane(channel)
    window = [base + ((n & 7) + (n >> 3 & 1) * 8 + (n >> 4)) * 16 for n in range(32)]
    transposed = [base + ((n & 7) + (n >> 4) * 8 + (n >> 3 & 1)) * 16 for n in range(32)]
    for addresses in (window, transposed):
        assert wavefronts(addresses, 16) == 4
        assert max(addresses) + 16 <= base + PAIR_PLANE
    for first in (0, 1):  # leads of 4 and 8
        tiles = [
            (n >> 4) * PAIR_ROW + base + ((n & 7) + (n >> 3 & 1) * 8 + first) * 16
            for n in range(32)
        ]
        assert wavefronts(tiles, 16) == 4
        assert max(tiles) + 16 <= PAIR_ROW + base + PAIR_PLANE
    masks = [
        (n >> 3 & 1) * PAIR_PLANE + ((n & 7) + (n >> 4) * 8 + (n >> 3 & 1)) * 16 for n in range(32)
    ]
    assert wavefronts(masks, 16) == 4
    # x̂ and the mask, a plane of another struct, 8 lanes each in turn
    factors = [
        ((n & 7) + (n >> 4) * 8 + 1) * 16 + (4 * PAIR_ROW + PAIR_PLANE if n >> 3 & 1 else base)
        for n in range(32)
    ]
    assert wavefronts(factors, 16) == 4
    assert wavefronts([base + 16 + n * 4 for n in range(32)], 4) == 1


MAP_PLANE = 8 * 256 + 64


def test_small_maps_fill_and_drain():
    """A thread's row of an image, 8 pixels of a channel (common/small_map.cuh)."""
    for row, i in ((r, i) for r in range(8) for i in range(8)):
        cells = [(2 * i + (n & 1)) * MAP_PLANE + row * 256 + (n >> 1) * 16 for n in range(32)]
        assert wavefronts(cells, 16) == 4


@pytest.mark.parametrize("channel", range(16))
def test_small_maps_matrices(channel):
    base = plane_of(channel) * MAP_PLANE
    for pair in range(4):
        rows = [base + pair * 512 + n * 16 for n in range(32)]
        transposed = [
            base + pair * 512 + (n & 7) * 16 + (n >> 3 & 1) * 256 + (n >> 4) * 128
            for n in range(32)
        ]
        for addresses in (rows, transposed):
            assert len(set(addresses)) == 32
            assert wavefronts(addresses, 16) == 4
    assert wavefronts([base + n * 4 for n in range(32)], 4) == 1


@pytest.mark.parametrize("size", [3, 5, 7, 9, 11, 13])
def test_small_maps_bands(size):
    words = []
    for lane in range(32):
        index = 2 * (lane & 3) - (lane >> 2) + 7
        words.append(8 + (index + 1) // 2 if index & 1 else index // 2)
    assert all(0 <= word < 16 for word in words)
    assert wavefronts([word * 4 for word in words], 4) == 1
    # The fill: a thread writes a row of 20 words, 16 bytes at a time.
    for first in range(0, 16 * size - 31, 32):
        assert wavefronts([(first + n) * 80 for n in range(32)], 16) == 4


@pytest.mark.parametrize("size", [3, 5, 7, 9, 11, 13])
def test_small_maps_diagonals(size):
    """The sums of the products' diagonals: two wavefronts at most."""
    row_words = 64 + size + 1
    rows = min(size, MAP_PLANE // 4 // row_words)
    assert rows * row_words * 4 <= MAP_PLANE
    for row in range(rows):
        stores = [(row * row_words + (n >> 2) * 8 + (n & 3) * 2) * 4 for n in range(32)]
        assert all(address % 8 == 0 for address in stores)
        assert wavefronts(stores, 8) == 2
    for tap in range(0, rows * size, 32):
        for j in range(8):
            loads: list[int | None] = []
            for row, kx in (divmod(t, size) for t in range(tap, tap + 32)):
                d = kx - size // 2
                inside = row < rows and 0 <= j - d < 8
                loads.append((row * row_words + 9 * j - d) * 4 if inside else None)
            assert wavefronts(loads, 4) <= 2


FMA_POSITION = 32 * 4
FMA_SIZES = [3, 5, 7, 9, 11, 13]


def fma_vectors(bits: int, warp: int = 0) -> list[tuple[int, int]]:
    """Position and first channel of the 16 bytes in memory that each lane fetches and fills."""
    vectors = 32 * bits // 128
    threads = range(warp * 32, warp * 32 + 32)
    return [(t // vectors, t % vectors * (128 // bits)) for t in threads]


@pytest.mark.parametrize("warp", range(8))
@pytest.mark.parametrize("bits", [32, 16])
def test_fma_fetch_and_fill(bits, warp):
    """Rows arrive and become floats in the same cells, 16 bytes or, of 16-bit types, 32."""
    cells = [p * FMA_POSITION + c * 4 for p, c in fma_vectors(bits, warp)]
    # Of 16-bit types every other 16 bytes, so that two positions meet in the same banks: 8 of some
    # 200 wavefronts of a row. Those types come here for 11×11 and 13×13 alone.
    for half in range(32 // bits):
        assert wavefronts([cell + half * 16 for cell in cells], 16) == (4 if bits == 32 else 8)
    assert len(set(cells)) == 32
    # A position's source and statistics, a word for all of its lanes; γ and β
    assert wavefronts([p * 4 for p, _ in fma_vectors(bits, warp)], 4) == 1
    for channel in range(128 // bits):
        assert wavefronts([(c + channel) * 4 for _, c in fma_vectors(bits, warp)], 4) == 1


@pytest.mark.parametrize("size", FMA_SIZES)
def test_fma_taps(size):
    """The taps' way in, and the weight gradient's way out: channel by channel, a pitch of 33."""
    taps = size * size
    for first in range(0, 32 * taps, 32):
        places = [divmod(i, taps) for i in range(first, first + 32)]
        for flipped in (False, True):
            words = [(taps - 1 - t if flipped else t) * 33 + c for c, t in places]
            # Taps of several channels may meet; it is once in a block.
            channels = places[-1][0] - places[0][0] + 1
            assert wavefronts([word * 4 for word in words], 4) <= channels
    for tap in range(taps):
        assert wavefronts([(tap * 33 + lane) * 4 for lane in range(32)], 4) == 1


@pytest.mark.parametrize("size", FMA_SIZES)
def test_fma_products(size):
    """A lane is a channel, so that a position is 32 banks, wherever a strip begins."""
    for base in range(8 * (7 + size // 2)):
        for neighbour in range(7 + size - 1):
            assert (
                wavefronts([(base + neighbour) * FMA_POSITION + n * 4 for n in range(32)], 4) == 1
            )
