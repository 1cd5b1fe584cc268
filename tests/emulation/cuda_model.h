// The CUDA programming model on a host CPU: a kernel header that reaches CUDA only through
// csrc/common/{launch,memory,mma}.cuh compiles against this with a C++20 compiler and runs, one
// block at a time, one fiber per thread of the block.
//
// A thread runs until it waits: at __syncthreads, or at a warp operation (shuffle, vote,
// __syncwarp, mma, ldmatrix) until the lanes in its mask are there too. In between, threads run in
// an order drawn from the seed: 0 ascending, 1 descending, others a new permutation at every turn.
// What the model finds wrong it throws as a Fault that names the kernel, block, thread and place:
//     divergent barrier     threads of a block at different barriers, or some gone
//     deadlock              a warp operation that a lane in its mask never reaches
//     memory                see checked_memory.h: bounds, alignment, unwritten shared memory, races
// x86-64 Linux only (the switch below).
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint2 {
    unsigned x, y;
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }

namespace emulation {

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class State : std::uint8_t { ready, at_barrier, in_warp, done };

struct AsyncCopy {
    void* shared;
    std::size_t size;
    unsigned char bytes[16];
};

struct Thread {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    uint3 index{};
    int linear = 0;
    State state = State::done;
    const char* where = "";
    unsigned mask = 0;
    void* operand = nullptr;                           // of the warp operation it waits in
    std::vector<std::vector<AsyncCopy>> async_groups;  // committed, oldest first
    std::vector<AsyncCopy> async_open;
};

// What a test may set before a launch.
struct Settings {
    unsigned seed = 0;
    int skipped_barrier =
        -1;  // plants a fault: this barrier site, in order of first use, is a no-op
    bool check_races = true;  // off: only the numbers can show a missing barrier
};

struct Machine {
    Settings settings;
    const char* kernel = "";
    dim3 grid, block;
    uint3 block_index{};
    std::vector<Thread> threads;
    int thread_count = 0;
    Thread* current = nullptr;
    void* scheduler_stack_pointer = nullptr;
    const std::function<void()>* body = nullptr;
    std::string fault;
    std::vector<const char*> barrier_sites;
    std::size_t shared_bytes = 0;
    std::uint32_t epoch = 1;             // grows at every barrier and every block
    std::uint32_t block_epoch = 1;       // the epoch in which this block started
    std::uint32_t warp_epochs[32] = {};  // grow at every __syncwarp of the whole warp
};

inline Machine machine;

constexpr std::size_t kStackBytes = 128 << 10;
constexpr std::size_t kPageBytes = 4096;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kMaxSharedBytes = 227 << 10;
// What a block can have on the device that is emulated; less on some than on others.
inline int device_shared_bytes = kMaxSharedBytes;

inline std::string place() {
    const Machine& m = machine;
    std::string text = std::string(m.kernel) + ", block (" + std::to_string(m.block_index.x) +
                       ", " + std::to_string(m.block_index.y) + ", " +
                       std::to_string(m.block_index.z) + ")";
    if (m.current != nullptr) text += ", thread " + std::to_string(m.current->linear);
    return text;
}

[[noreturn]] inline void fail(const std::string& what) { throw Fault(what + " [" + place() + "]"); }

// Saves the callee-saved registers and the stack pointer in *from, and goes on at `to`.
extern "C" void convnest_emulation_switch(void** from, void* to);
asm(R"(
    .text
    .weak convnest_emulation_switch
    .type convnest_emulation_switch, @function
convnest_emulation_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
    .size convnest_emulation_switch, . - convnest_emulation_switch
)");

inline void yield_to_scheduler() {
    convnest_emulation_switch(&machine.current->stack_pointer, machine.scheduler_stack_pointer);
}

inline void thread_entry() {
    try {
        (*machine.body)();
        if (!machine.current->async_open.empty()) fail("an async copy was never committed");
    } catch (const std::exception& error) {
        if (machine.fault.empty()) machine.fault = error.what();
    }
    machine.current->state = State::done;
    yield_to_scheduler();
    __builtin_trap();
}

inline void wait(State state, const char* where) {
    machine.current->state = state;
    machine.current->where = where;
    yield_to_scheduler();
}

// True if the settings plant the fault that this barrier does nothing.
inline bool skips_barrier(const char* where) {
    auto& sites = machine.barrier_sites;
    const auto same = [&](const char* site) { return std::strcmp(site, where) == 0; };
    const auto found = std::find_if(sites.begin(), sites.end(), same);
    const auto number = static_cast<int>(found - sites.begin());
    if (found == sites.end()) sites.push_back(where);
    return number == machine.settings.skipped_barrier;
}

inline void barrier(const char* where) {
    if (!skips_barrier(where)) wait(State::at_barrier, where);
}

// Runs combine(operands by lane; null outside of the mask) once all lanes of the mask are here.
template <class Operand, class Combine>
void warp_operation(const char* where, unsigned mask, Operand& operand, const Combine& combine) {
    Thread& self = *machine.current;
    const int first = self.linear & ~31;
    if (!(mask >> (self.linear & 31) & 1))
        fail(std::string(where) + ": the lane is not in its own mask");
    self.operand = &operand;
    Operand* operands[32] = {};
    for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        if (first + lane >= machine.thread_count)
            fail(std::string(where) + ": the mask names a lane that does not exist");
        Thread& other = machine.threads[first + lane];
        const bool here = &other == &self || (other.state == State::in_warp && other.mask == mask &&
                                              std::strcmp(other.where, where) == 0);
        if (!here) {
            self.mask = mask;
            wait(State::in_warp, where);
            return;  // the last lane has combined
        }
        operands[lane] = static_cast<Operand*>(other.operand);
    }
    combine(operands);
    for (int lane = 0; lane < 32; ++lane) {
        if (mask >> lane & 1) machine.threads[first + lane].state = State::ready;
    }
}

inline void sync_warp(const char* where, unsigned mask = 0xffffffffu) {
    if (skips_barrier(where)) return;
    int nothing = 0;
    warp_operation(where, mask, nothing, [&](int*(&)[32]) {
        if (mask == 0xffffffffu) ++machine.warp_epochs[machine.current->linear / 32];
    });
}

template <class T>
T shuffle(const char* where, unsigned mask, T value, int source) {
    struct Operand {
        T value, result;
        int source;
    } operand{value, value, source & 31};
    warp_operation(where, mask, operand, [&](Operand*(&lanes)[32]) {
        for (Operand* lane : lanes) {
            if (lane == nullptr) continue;
            if (lanes[lane->source] == nullptr)
                fail(std::string(where) + ": the source lane is not in the mask");
            lane->result = lanes[lane->source]->value;
        }
    });
    return operand.result;
}

inline unsigned ballot(const char* where, unsigned mask, bool predicate) {
    struct Operand {
        bool predicate;
        unsigned result;
    } operand{predicate, 0};
    warp_operation(where, mask, operand, [&](Operand*(&lanes)[32]) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) {
            if (lanes[lane] != nullptr && lanes[lane]->predicate) votes |= 1u << lane;
        }
        for (Operand* lane : lanes) {
            if (lane != nullptr) lane->result = votes;
        }
    });
    return operand.result;
}

inline int lane_of_current() { return machine.current->linear & 31; }

}  // namespace emulation

#include "checked_memory.h"
#include "scheduler.h"

#define EMULATION_TEXT_(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT_(x)
#define EMULATION_HERE(name) name " (" __FILE__ ":" EMULATION_TEXT(__LINE__) ")"

#define threadIdx (emulation::machine.current->index)
#define blockIdx (emulation::machine.block_index)
#define blockDim (emulation::machine.block)
#define gridDim (emulation::machine.grid)
#define __syncthreads() emulation::barrier(EMULATION_HERE("__syncthreads"))
#define __syncwarp(...) \
    emulation::sync_warp(EMULATION_HERE("__syncwarp") __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(mask, value, lane) \
    emulation::shuffle(EMULATION_HERE("__shfl_sync"), mask, value, lane)
#define __shfl_xor_sync(mask, value, bits)                             \
    emulation::shuffle(EMULATION_HERE("__shfl_xor_sync"), mask, value, \
                       emulation::lane_of_current() ^ (bits))
#define __shfl_down_sync(mask, value, delta)                            \
    emulation::shuffle(EMULATION_HERE("__shfl_down_sync"), mask, value, \
                       emulation::lane_of_current() + (delta) > 31      \
                           ? emulation::lane_of_current()               \
                           : emulation::lane_of_current() + (delta))
#define __ballot_sync(mask, predicate) \
    emulation::ballot(EMULATION_HERE("__ballot_sync"), mask, predicate)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))

#define CONVNEST_SHARED_MEMORY(Struct, name) \
    Struct& name = *static_cast<Struct*>(emulation::shared_memory(sizeof(Struct)))
