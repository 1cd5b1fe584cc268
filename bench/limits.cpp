// What one core of this machine can do, for bench/limits.py: it prints three rates, one a line,
// then the bytes of a working set and the bandwidth of a copy within it, for each level of memory.
//
// Multiply-adds from registers (float, and bfloat16 pairs where the instruction set has them), and
// the library's own GELU over a buffer in the L1 cache. Each is the best of many short runs.
#include <cstdio>
#include <cstdlib>
#include <ctime>

#include "common/gelu.h"

namespace convnest::CONVNEST_ISA {
namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

template <class F>
double best_seconds(int runs, F&& f) {
    double best = 1e9;
    for (int i = 0; i < runs; ++i) {
        const double start = now();
        f();
        const double took = now() - start;
        if (took < best) best = took;
    }
    return best;
}

constexpr int kRuns = 300, kSums = 12, kSteps = 20000, kElements = 2048, kPasses = 50;
volatile float sink;

double fma_rate() {
    const double seconds = best_seconds(kRuns, [] {
        Floats sum[kSums];
        for (int s = 0; s < kSums; ++s) sum[s] = float(s) + Floats{};  // not one sum for all
        Floats a = 1.0f + Floats{}, b = a;
        asm volatile("" : "+v"(a), "+v"(b));
        for (int i = 0; i < kSteps; ++i) {
            unroll<kSums>([&](auto s) CONVNEST_INLINE_LAMBDA { sum[s] += a * b; });
            asm volatile("" : "+v"(a));
        }
        for (const Floats& s : sum) sink = s[0];
    });
    return 2.0 * kSums * kSteps * kLanes<float> / seconds;
}

double bfloat16_rate() {
#if defined(__AVX512BF16__)
    const double seconds = best_seconds(kRuns, [] {
        __m512 sum[kSums];
        for (int s = 0; s < kSums; ++s) sum[s] = _mm512_set1_ps(s);
        __m512i a = _mm512_set1_epi32(0x3f803f80), b = a;
        asm volatile("" : "+v"(a), "+v"(b));
        for (int i = 0; i < kSteps; ++i) {
            unroll<kSums>([&](auto s) CONVNEST_INLINE_LAMBDA {
                sum[s] = _mm512_dpbf16_ps(sum[s], (__m512bh)a, (__m512bh)b);
            });
            asm volatile("" : "+v"(a));
        }
        for (const __m512& s : sum) sink = s[0];
    });
    return 4.0 * kSums * kSteps * kLanes<float> / seconds;
#else
    return 0;
#endif
}

double gelu_rate() {
    static float values[kElements], results[kElements];
    for (int i = 0; i < kElements; ++i) values[i] = 4.0f * i / kElements - 2;
    const double seconds = best_seconds(kRuns, [] {
        for (int pass = 0; pass < kPasses; ++pass) {
            over_channels<float>(kElements, [](std::int64_t i, auto lanes) CONVNEST_INLINE_LAMBDA {
                store_all(results + i, gelu_of<float>(load_all(values + i, lanes)));
            });
            asm volatile("" ::: "memory");
        }
    });
    return double(kElements) * kPasses / seconds;
}

// Bytes read and written a second by out = 2 in, both halves of a working set.
double bandwidth(std::int64_t bytes) {
    const std::int64_t count = bytes / 8;
    float* in = static_cast<float*>(std::aligned_alloc(64, bytes));
    float* out = in + count;
    for (std::int64_t i = 0; i < 2 * count; ++i) in[i] = 1;
    const int passes = bytes < (8 << 20) ? (8 << 20) / bytes : 1;
    const double seconds = best_seconds(bytes > (64 << 20) ? 8 : 60, [&] {
        for (int pass = 0; pass < passes; ++pass) {
            for (std::int64_t i = 0; i < count; i += kLanes<float>) {
                store(out + i, load(in + i) * 2.0f);
            }
            asm volatile("" ::: "memory");
        }
    });
    std::free(in);
    return double(bytes) * passes / seconds;
}

}  // namespace
}  // namespace convnest::CONVNEST_ISA

int main() {
    using namespace convnest::CONVNEST_ISA;
    std::printf("%g\n%g\n%g\n", fma_rate(), bfloat16_rate(), gelu_rate());
    for (std::int64_t kib : {24, 512, 8192, 262144}) {
        std::printf("%lld %g\n", static_cast<long long>(kib) * 1024, bandwidth(kib * 1024));
    }
}
