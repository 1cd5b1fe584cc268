// How the pixels of a batch lie under the blocks of the tensor-core convolutions.
//
// A block sees virtual rows of 124 pixels, v in [−4, 120 or 124), and marches down them:
//     narrow images (W <= 124): as many as fit stand side by side, `radius` zero pixels apart
//     wide images: one image, cut into strips of 120 outputs, with 4 pixels of halo on both sides
// and so in height: the images of a column stand below each other, `radius` zero rows apart, so
// that a small map wastes radius/(H + radius) of its rows and nothing is rounded up to a stage. A
// gap serves the image above and the one below.
//
// An item of work is a column (or strip) times a chunk of its rows. A chunk is a run of whole
// images, or one part of an image, which then reads up to 2·radius rows of halo again.
#pragma once

#include "common/launch.cuh"

namespace convnest::cuda {

constexpr int kCanvasPixels = 124;  // filled pixels of a virtual row right of the 4 that lead it
constexpr int kLeadPixels = 4;      // the largest radius; keeps the band's window 16-byte aligned
constexpr int kStripOutputs = kCanvasPixels - kLeadPixels;

struct Canvas {
    int images, height, width, radius;
    int beside;        // images side by side in a virtual row; 1 with strips
    int down;          // images below each other
    int strips;        // 1 unless the image is wider than the canvas
    int chunk_images;  // whole images to a chunk; 1 if `parts` > 1
    int parts;         // chunks to an image
    int part_rows;     // rows of a chunk
    int chunks;        // chunks to a column
    int items;         // chunks · strips · columns: the grid's extent

    __host__ __device__ int pitch() const { return height + radius; }
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Cuts a batch into items. `wanted_items`: enough to fill a large GPU a few times over (the caller
// divides by its channel blocks). Pure, and a function of the shape only: the order of the sums
// that are taken over items must not depend on the device.
inline Canvas plan_canvas(int images, int height, int width, int radius, int wanted_items) {
    // Below this many rows the halo of 2·radius rows is more than a third of the work.
    constexpr int kFewestRows = 16;
    // From here on the rows a chunk wastes at its ends are under 5%.
    constexpr int kEnoughRows = 64;
    Canvas c{};
    c.images = images, c.height = height, c.width = width, c.radius = radius;
    const bool narrow = width <= kCanvasPixels;
    c.beside = narrow ? (kCanvasPixels + radius) / (width + radius) : 1;
    if (c.beside > images) c.beside = images;
    c.strips = narrow ? 1 : ceil_div(width, kStripOutputs);
    const int down = c.down = ceil_div(images, c.beside);
    c.chunk_images = c.parts = 1;
    const long wanted_chunks = ceil_div(wanted_items, c.strips);
    if (down < wanted_chunks) {
        const long parts = ceil_div(static_cast<int>(wanted_chunks), down);
        const int most = height / kFewestRows > 1 ? height / kFewestRows : 1;
        c.parts = static_cast<int>(parts < most ? parts : most);
    } else {
        while (c.chunk_images * c.pitch() < kEnoughRows &&
               down / (c.chunk_images + 1) >= wanted_chunks) {
            ++c.chunk_images;
        }
    }
    c.part_rows = c.parts > 1 ? ceil_div(height, c.parts) : c.chunk_images * c.pitch();
    if (c.parts > 1) c.parts = ceil_div(height, c.part_rows);
    c.chunks = ceil_div(down, c.chunk_images) * c.parts;
    c.items = c.chunks * c.strips;
    return c;
}

// The bottom row of images of the canvas, of which some may be missing.
struct BottomImages {
    std::uint32_t first, end;  // pixels of the leftmost
    std::uint32_t pixels;      // how many exist from the first on
};

inline BottomImages bottom_images(const Canvas& c) {
    const auto image = static_cast<std::uint32_t>(c.height * c.width);
    const auto above = static_cast<std::uint32_t>((c.down - 1) * c.beside);
    return {above * image, (above + 1) * image,
            (static_cast<std::uint32_t>(c.images) - above) * image};
}

// One item: outputs of virtual rows [first, end), input rows from `start` on.
struct Item {
    int start, first, end;
    int top_image;  // of the leftmost image of row `start`
    int top_y;      // row `start` within it
    int strip;
};

__device__ __forceinline__ Item item_of(const Canvas& c, int index) {
    Item item;
    const unsigned chunk = static_cast<unsigned>(index) / static_cast<unsigned>(c.strips);
    item.strip = index - static_cast<int>(chunk) * c.strips;
    const int group = static_cast<int>(chunk / static_cast<unsigned>(c.parts));
    const int offset = (static_cast<int>(chunk) - group * c.parts) * c.part_rows;
    const int top = group * c.chunk_images, pitch = c.pitch();
    const int down = c.down;
    const int bottom = (top + c.chunk_images < down ? top + c.chunk_images : down) * pitch;
    item.first = top * pitch + offset;
    item.end =
        item.first + c.part_rows < bottom - c.radius ? item.first + c.part_rows : bottom - c.radius;
    item.top_y = offset - c.radius > 0 ? offset - c.radius : 0;
    item.start = item.first - (offset - item.top_y);
    item.top_image = top * c.beside;
    return item;
}

// A thread's walk down the virtual rows: where its row lies, from stage to stage.
template <int kRadius>
struct RowWalk {
    int y;                // row of the image; outside of [0, height): a gap
    std::uint32_t pixel;  // index of the row's first pixel (leftmost image), modulo 2^32

    __device__ __forceinline__ RowWalk(const Canvas& c, const Item& item, int ahead)
        : y(item.top_y + ahead) {
        pixel = static_cast<std::uint32_t>(item.top_image * c.height + y) * c.width;
        wrap(c);
    }

    __device__ __forceinline__ void advance(const Canvas& c, int rows) {
        y += rows;
        pixel += static_cast<std::uint32_t>(rows * c.width);
        wrap(c);
    }

    __device__ __forceinline__ bool inside(const Canvas& c) const {
        return static_cast<unsigned>(y) < static_cast<unsigned>(c.height);
    }

    // Of an image that exists: the walk may go on below the bottom ones.
    __device__ __forceinline__ bool inside(const Canvas& c, const BottomImages& bottom) const {
        return inside(c) && pixel < bottom.end;
    }

  private:
    __device__ __forceinline__ void wrap(const Canvas& c) {
        const int pitch = c.height + kRadius;
        const auto down = static_cast<std::uint32_t>((c.beside * c.height - pitch) * c.width);
        // A step is at most 4 rows, so that from radius 3 on it passes at most one image.
        if constexpr (kRadius >= 3) {
            if (y >= pitch) y -= pitch, pixel += down;
        } else {
            while (y >= pitch) y -= pitch, pixel += down;
        }
    }
};

// Whether a thread's row is one of its item's outputs, from stage to stage of 4 rows. The halo
// above an item has at most 4 rows, so that it ends with the first stage.
struct OutputRows {
    int left;
    bool halo;

    __device__ __forceinline__ OutputRows(const Item& item, int row)
        : left(item.end - item.start - row), halo(row < item.first - item.start) {}
    __device__ __forceinline__ bool holds() const { return left > 0 && !halo; }
    __device__ __forceinline__ void advance(int rows) { left -= rows, halo = false; }
};

// Four neighbouring pixels of the virtual rows, v0 .. v0 + 3, the same in every row of an item.
struct PixelQuad {
    std::uint32_t offset[4];  // from the row's first pixel
    unsigned readable;        // bits: is a pixel of some image
    unsigned owned;           // bits: is an output of this item

    __device__ __forceinline__ PixelQuad(const Canvas& c, const Item& item, int v0)
        : readable(0), owned(0) {
        // Left of the canvas (v < 0) lies no pixel of side-by-side images: x stays negative there.
        const unsigned pitch = static_cast<unsigned>(c.width + c.radius);
        const int first = c.strips == 1 ? (v0 < 0 ? 0 : static_cast<int>(v0 / pitch)) : 0;
        int image = first, x = c.strips == 1 ? v0 - first * static_cast<int>(pitch)
                                             : v0 + item.strip * kStripOutputs;
#pragma unroll
        for (int i = 0; i < 4; ++i, ++x) {
            if (c.strips == 1 && x == static_cast<int>(pitch)) x = 0, ++image;
            const int v = v0 + i;
            const bool owns = c.strips == 1 || (v >= 0 && v < kStripOutputs);
            const bool is_pixel = x >= 0 && x < c.width && image < c.beside;
            offset[i] = static_cast<std::uint32_t>(image * c.height * c.width + x);
            readable |= static_cast<unsigned>(is_pixel) << i;
            owned |= static_cast<unsigned>(is_pixel && owns) << i;
        }
    }
};

// Which of a quad's pixels exist, in an item's rows and in those of its bottom images, as bits.
struct QuadBits {
    std::uint32_t bits;

    __device__ __forceinline__ QuadBits(const PixelQuad& quad, const BottomImages& bottom,
                                        bool channels_exist) {
        unsigned exist = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            exist |= static_cast<unsigned>(quad.offset[i] < bottom.pixels) << i;
        }
        const unsigned mine = channels_exist ? 0xff : 0;
        const auto row = [&](unsigned all) {
            const unsigned pixels = (quad.readable & all) | (quad.owned & all) << 4;
            return pixels | (pixels & mine) << 8;
        };
        bits = row(15) | row(exist) << 16;
    }

    // Of the row whose first pixel is `pixel`, bits 0–3: the pixel exists, 4–7: it is an output of
    // this item; 8–15: the same, and the thread's channels exist.
    __device__ __forceinline__ unsigned at(std::uint32_t pixel, const BottomImages& bottom) const {
        return pixel >= bottom.first ? bits >> 16 : bits;
    }
};

}  // namespace convnest::cuda
