// Host twins of the warp-level matrix instructions, written from the PTX manual's layouts (see
// csrc/common/mma.cuh, which says them); included by it.
#pragma once

namespace emulation {

// One mma.m16n8k16: gathers the fragments into whole matrices, multiplies, scatters.
template <class Element>
void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                 const float (&c)[4]) {
    struct Operand {
        float* d;
        const std::uint32_t *a, *b;
        const float* c;
    } operand{d, a, b, c};
    warp_operation("mma", 0xffffffffu, operand, [](Operand*(&lanes)[32]) {
        float A[16][16], B[16][8], D[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane >> 2, t = lane & 3;
            for (int i = 0; i < 4; ++i) {
                const int row = g + (i & 1) * 8, column = 2 * t + (i >> 1) * 8;
                A[row][column] = Element::low(lanes[lane]->a[i]);
                A[row][column + 1] = Element::high(lanes[lane]->a[i]);
            }
            for (int i = 0; i < 2; ++i) {
                B[2 * t + 8 * i][g] = Element::low(lanes[lane]->b[i]);
                B[2 * t + 8 * i + 1][g] = Element::high(lanes[lane]->b[i]);
            }
            for (int i = 0; i < 4; ++i) D[g + (i >> 1) * 8][2 * t + (i & 1)] = lanes[lane]->c[i];
        }
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < 16; ++k) {
                for (int column = 0; column < 8; ++column)
                    D[row][column] += A[row][k] * B[k][column];
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane >> 2, t = lane & 3;
            for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = D[g + (i >> 1) * 8][2 * t + (i & 1)];
        }
    });
}

// ldmatrix.x4; each lane's read of its row is checked as that lane's.
inline void load_matrices(std::uint32_t (&r)[4], const void* row, bool transposed) {
    struct Operand {
        std::uint32_t* r;
        const void* row;
    } operand{r, row};
    const int first = machine.current->linear & ~31;
    warp_operation(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, operand,
                   [&](Operand*(&lanes)[32]) {
                       std::uint16_t rows[32][8];
                       for (int lane = 0; lane < 32; ++lane) {
                           check_shared_read(lanes[lane]->row, 16, first + lane);
                           std::memcpy(rows[lane], lanes[lane]->row, 16);
                       }
                       for (int lane = 0; lane < 32; ++lane) {
                           const int g = lane >> 2, t = lane & 3;
                           for (int i = 0; i < 4; ++i) {
                               const auto& m = rows + 8 * i;
                               const std::uint32_t low = transposed ? m[2 * t][g] : m[g][2 * t];
                               const std::uint32_t high =
                                   transposed ? m[2 * t + 1][g] : m[g][2 * t + 1];
                               lanes[lane]->r[i] = low | high << 16;
                           }
                       }
                   });
}

}  // namespace emulation
