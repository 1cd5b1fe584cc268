// What the launches of the convolutions decide alike: how a batch is cut for the tensor cores, and
// where things lie in a workspace. Functions of the shape alone.
#pragma once

#include "common/canvas.cuh"
#include "common/planes.cuh"

namespace convnest::cuda {

inline bool aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// Blocks of 256 threads that fill the largest GPU (148 SMs, 2 blocks each) about six times over, so
// that a last, part-filled wave costs little.
constexpr int kWantedBlocks = 2048;
// The FMA units' weight gradient's blocks stay, two for each SM of the largest GPUs, and its items
// are a few to a block, so that blocks end together.
constexpr int kPersistentBlocks = 2 * 148;
constexpr int kItemsPerBlock = 4;

inline int channel_blocks(int C) { return ceil_div(C, kBlockChannels); }

inline Canvas convolution_canvas(int N, int H, int W, int C, int kernel_size) {
    return plan_canvas(N, H, W, kernel_size / 2, ceil_div(kWantedBlocks, channel_blocks(C)));
}

struct WgradPlan {
    Canvas canvas;
    int groups;  // of partial sums
};

// An item to a block, as in forward. Blocks that stay do not divide evenly among the SMs of every
// GPU: an H200 ran 264 of stage 1's 324 at once, and then the rest.
inline WgradPlan plan_wgrad(int N, int H, int W, int C, int kernel_size) {
    const Canvas canvas = convolution_canvas(N, H, W, C, kernel_size);
    return {canvas, canvas.items};
}

// Deals out a workspace, 16-byte aligned; `bytes` is what has been dealt.
struct Workspace {
    std::size_t bytes = 0;

    std::size_t take(std::size_t size) {
        const std::size_t offset = bytes;
        bytes += (size + 15) / 16 * 16;
        return offset;
    }
};

}  // namespace convnest::cuda
