// Memory as the emulated kernels see it. Every access is checked against
//   - its bounds: the launch's shared bytes, or one of the buffers a test has declared;
//   - its natural alignment (a 16-byte access needs 16-byte alignment on a GPU);
//   - shared memory that no thread of the block wrote, which also holds NaN bits;
//   - races: in shared memory, two accesses by different threads, one of them a write, with no
//     __syncthreads between them, nor, within a warp, a __syncwarp; in global memory, two threads
//     that write the same element in one launch, or one that reads what another wrote.
// Races are found from the order of barriers, not from the order in which the fibers happened to
// run. Included by cuda_model.h.
#pragma once

namespace emulation {

constexpr std::size_t kGranule = 2;  // the smallest element, in bytes

// Who touched a granule of shared memory last, and when.
struct SharedCell {
    std::uint32_t write_epoch = 0, read_epoch = 0;
    std::uint32_t write_warp_epoch = 0, read_warp_epoch = 0;
    std::int16_t writer = 0;
    std::int16_t reader = 0;  // a thread, or one of the two below
    std::int16_t reader_warp = 0;
};
constexpr std::int16_t kSeveralLanes = -1, kSeveralWarps = -2;

alignas(128) inline unsigned char shared_arena[kMaxSharedBytes];
inline SharedCell shared_cells[kMaxSharedBytes / kGranule];

struct Buffer {
    std::string name;
    std::uintptr_t begin, end;
    bool writable;
    std::vector<std::uint32_t> writers;  // 1 + the launch-wide thread number, by granule; 0: none
};
inline std::vector<Buffer> buffers;

inline void poison_shared_memory() { std::memset(shared_arena, 0xff, machine.shared_bytes); }

inline void* shared_memory(std::size_t bytes) {
    if (bytes > machine.shared_bytes)
        fail("the kernel's shared memory is larger than the launch's");
    return shared_arena;
}

inline void declare_buffer(std::string name, const void* address, std::size_t bytes,
                           bool writable) {
    const auto begin = reinterpret_cast<std::uintptr_t>(address);
    buffers.push_back({std::move(name), begin, begin + bytes, writable, {}});
}

inline void begin_launch() {
    for (Buffer& buffer : buffers) {
        if (buffer.writable) buffer.writers.assign((buffer.end - buffer.begin) / kGranule, 0);
    }
}

inline void check_alignment(const void* address, std::size_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
        fail("misaligned access of " + std::to_string(bytes) + " bytes");
    }
}

// The cells of a shared access by `thread`, after the check of its bounds.
inline SharedCell* cells_of(const void* address, std::size_t bytes) {
    check_alignment(address, bytes);
    const auto offset = static_cast<const unsigned char*>(address) - shared_arena;
    if (offset < 0 || static_cast<std::size_t>(offset) + bytes > machine.shared_bytes) {
        fail("shared memory out of bounds: offset " + std::to_string(offset) + " of " +
             std::to_string(machine.shared_bytes));
    }
    return shared_cells + offset / kGranule;
}

inline std::string race(const char* what, const void* address, int other) {
    const auto offset = static_cast<const unsigned char*>(address) - shared_arena;
    return std::string("race in shared memory, a barrier is missing: ") + what + " at offset " +
           std::to_string(offset) + " against thread " + std::to_string(other);
}

inline void check_shared_read(const void* address, std::size_t bytes, int thread) {
    SharedCell* cell = cells_of(address, bytes);
    const std::uint32_t epoch = machine.epoch;
    const int warp = thread / 32;
    const std::uint32_t warp_epoch = machine.warp_epochs[warp];
    for (std::size_t i = 0; i < bytes / kGranule; ++i, ++cell) {
        if (cell->write_epoch < machine.block_epoch) {
            fail("read of shared memory that no thread wrote, offset " +
                 std::to_string((cell - shared_cells) * static_cast<std::ptrdiff_t>(kGranule)));
        }
        if (!machine.settings.check_races) continue;
        if (cell->write_epoch == epoch && cell->writer != thread &&
            !(cell->writer / 32 == warp && cell->write_warp_epoch < warp_epoch)) {
            fail(race("read of a write", address, cell->writer));
        }
        if (cell->read_epoch != epoch) {
            cell->reader = static_cast<std::int16_t>(thread);
            cell->reader_warp = static_cast<std::int16_t>(warp);
        } else if (cell->reader_warp != warp) {
            cell->reader = kSeveralWarps;
        } else if (cell->reader != thread && cell->reader != kSeveralWarps) {
            cell->reader = kSeveralLanes;
        }
        cell->read_epoch = epoch;
        cell->read_warp_epoch = warp_epoch;
    }
}

inline void check_shared_write(const void* address, std::size_t bytes, int thread) {
    SharedCell* cell = cells_of(address, bytes);
    const std::uint32_t epoch = machine.epoch;
    const int warp = thread / 32;
    const std::uint32_t warp_epoch = machine.warp_epochs[warp];
    for (std::size_t i = 0; i < bytes / kGranule; ++i, ++cell) {
        if (machine.settings.check_races) {
            if (cell->write_epoch == epoch && cell->writer != thread &&
                !(cell->writer / 32 == warp && cell->write_warp_epoch < warp_epoch)) {
                fail(race("write over a write", address, cell->writer));
            }
            const bool ordered = cell->reader != kSeveralWarps && cell->reader_warp == warp &&
                                 cell->read_warp_epoch < warp_epoch;
            if (cell->read_epoch == epoch && cell->reader != thread && !ordered) {
                fail(race("write over a read", address, cell->reader));
            }
        }
        cell->writer = static_cast<std::int16_t>(thread);
        cell->write_epoch = epoch;
        cell->write_warp_epoch = warp_epoch;
    }
}

template <class T>
T load_shared(const void* address) {
    check_shared_read(address, sizeof(T), machine.current->linear);
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
}

template <class T>
void store_shared(void* address, T value) {
    check_shared_write(address, sizeof(T), machine.current->linear);
    std::memcpy(address, &value, sizeof(T));
}

inline Buffer& buffer_of(const void* address, std::size_t bytes) {
    check_alignment(address, bytes);
    static std::size_t last = 0;
    const auto at = reinterpret_cast<std::uintptr_t>(address);
    for (std::size_t i = 0; i < buffers.size(); ++i) {
        Buffer& buffer = buffers[(last + i) % buffers.size()];
        if (at >= buffer.begin && at + bytes <= buffer.end) {
            last = (last + i) % buffers.size();
            return buffer;
        }
    }
    std::string near;
    for (const Buffer& buffer : buffers) {
        if (at + 65536 >= buffer.begin && at < buffer.end + 65536) {
            near += "; " + std::to_string(static_cast<std::int64_t>(at - buffer.begin)) +
                    " bytes into " + buffer.name + " of " +
                    std::to_string(buffer.end - buffer.begin);
        }
    }
    fail("global memory out of bounds" + near);
}

inline std::uint32_t launch_wide_thread() {
    const Machine& m = machine;
    const std::uint32_t block =
        (m.block_index.z * m.grid.y + m.block_index.y) * m.grid.x + m.block_index.x;
    return block * static_cast<std::uint32_t>(m.thread_count) +
           static_cast<std::uint32_t>(m.current->linear) + 1;
}

inline void check_global_read(const void* address, std::size_t bytes) {
    Buffer& buffer = buffer_of(address, bytes);
    if (!buffer.writable) return;
    const std::uint32_t self = launch_wide_thread();
    const std::size_t first = (reinterpret_cast<std::uintptr_t>(address) - buffer.begin) / kGranule;
    for (std::size_t i = first; i < first + bytes / kGranule; ++i) {
        if (buffer.writers[i] != 0 && buffer.writers[i] != self) {
            fail("race in " + buffer.name + ": a thread reads what another wrote");
        }
    }
}

template <class T>
T load_global(const T* address) {
    check_global_read(address, sizeof(T));
    T value;
    std::memcpy(&value, address, sizeof(T));
    return value;
}

template <class T>
void store_global(T* address, T value) {
    Buffer& buffer = buffer_of(address, sizeof(T));
    if (!buffer.writable) fail("write to " + buffer.name + ", an input");
    const std::uint32_t self = launch_wide_thread();
    const std::size_t first = (reinterpret_cast<std::uintptr_t>(address) - buffer.begin) / kGranule;
    for (std::size_t i = first; i < first + sizeof(T) / kGranule; ++i) {
        if (buffer.writers[i] != 0 && buffer.writers[i] != self) {
            fail("race in " + buffer.name + ": two threads write the same element");
        }
        buffer.writers[i] = self;
    }
    std::memcpy(address, &value, sizeof(T));
}

// The bytes arrive at the wait; until then the destination counts as unwritten.
inline void async_copy(void* shared, const void* global, std::size_t bytes, bool present) {
    AsyncCopy copy{shared, bytes, {}};
    if (present) {
        check_global_read(global, bytes);
        std::memcpy(copy.bytes, global, bytes);
    }
    check_shared_write(shared, bytes, machine.current->linear);
    SharedCell* cell = cells_of(shared, bytes);
    for (std::size_t i = 0; i < bytes / kGranule; ++i) cell[i].write_epoch = 0;
    std::memset(shared, 0xff, bytes);
    machine.current->async_open.push_back(copy);
}

inline void async_copy16(void* shared, const void* global, bool present) {
    async_copy(shared, global, 16, present);
}

inline void async_copy_float(float* shared, const float* global, bool present) {
    async_copy(shared, global, sizeof(float), present);
}

inline void async_copy_commit() {
    Thread& self = *machine.current;
    self.async_groups.push_back(std::move(self.async_open));
    self.async_open.clear();
}

inline void async_copy_wait(std::size_t pending) {
    Thread& self = *machine.current;
    while (self.async_groups.size() > pending) {
        for (const AsyncCopy& copy : self.async_groups.front()) {
            check_shared_write(copy.shared, copy.size, self.linear);
            std::memcpy(copy.shared, copy.bytes, copy.size);
        }
        self.async_groups.erase(self.async_groups.begin());
    }
}

}  // namespace emulation
