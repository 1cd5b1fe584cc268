// Threads and scratch memory of the CPU kernels.
//
// Work is cut into units; a thread has a part of them, and takes of others' parts once it is done.
// Threads come from torch's pool when its symbols have been handed over (use_thread_pool), else
// from a small pool of our own. Several Python threads may call kernels at once. Nothing here
// throws through a foreign callback.
//
// Work whose parts build on each other is cut into phases, which threads pass together without
// going back to their pool: with OMP_WAIT_POLICY=PASSIVE a thread that is called from there takes
// 60 us to come and go, one that waits between two phases less than one.
//
// Scratch memory belongs to the thread and is kept between calls, since fresh pages cost more than
// what is done with them: up to kKeptScratchBytes for each thread's units and as much again for
// the calls that it makes. What a call needs beyond that is given back when it ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace convnest {

constexpr std::size_t kKeptScratchBytes = std::size_t{128} << 20;

// A kernel call's work, or a phase of it. `scratch` is the worker's own, 64-byte aligned; its
// contents are undefined. `prepare` may be null; it runs once per worker before its first unit.
// Units are numbered from `first` on.
struct Units {
    std::int64_t count;
    std::size_t scratch_bytes;
    void (*prepare)(char* scratch, void* context);
    void (*run)(std::int64_t unit, char* scratch, void* context);
    void* context;
    std::int64_t first = 0;
};

// Runs all units and waits. Throws std::bad_alloc in the calling thread when a worker had no
// memory; then the outputs are incomplete.
void run_units(const Units& units);

// The same for phases, each of which begins when the one before has ended. A worker waits for units
// that others have begun, so that any number of workers gets through, be it one.
class Phases {
  public:
    // Not inline: the kernels' files are compiled for more than every processor has.
    Phases();
    ~Phases();
    Phases(const Phases&) = delete;
    Phases& operator=(const Phases&) = delete;
    void add(const Units& units);
    void run() const;

  private:
    std::vector<Units> phases_;
};
void run_phases(std::initializer_list<Units> phases);

int num_threads();

// The number of threads of our own pool; throws std::logic_error when torch's is in use.
void set_num_threads(int count);

// Addresses of torch_parallel_for and torch_get_num_threads (torch/csrc/stable/c/shim.h).
void use_thread_pool(std::uintptr_t parallel_for, std::uintptr_t get_num_threads);

// Has fresh memory come in huge pages, as far as whole ones (2 MiB) fit into it: large memory that
// is streamed, or walked with long strides, is found faster then.
void ask_for_huge_pages(void* memory, std::size_t bytes);

// Memory of one kernel call, owned by the calling thread until the scope ends; 64-byte aligned.
// Throws std::bad_alloc.
class CallScratch {
  public:
    explicit CallScratch(std::size_t bytes);
    ~CallScratch();
    CallScratch(const CallScratch&) = delete;
    CallScratch& operator=(const CallScratch&) = delete;
    char* data() const { return data_; }

  private:
    char* data_;
};

// Hands out consecutive 64-byte aligned pieces. With a null base it only counts bytes. Under the
// address sanitizer there is a line between two pieces that must not be touched.
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}
    template <class A>
    A* take(std::int64_t count) {
        const std::size_t at = used_;
        used_ += (static_cast<std::size_t>(count) * sizeof(A) + 63) / 64 * 64;
#if defined(__SANITIZE_ADDRESS__)
        used_ += 64;
        if (base_ != nullptr) {
            ASAN_UNPOISON_MEMORY_REGION(base_ + at, used_ - at);
            ASAN_POISON_MEMORY_REGION(base_ + used_ - 64, 64);
        }
#endif
        return base_ == nullptr ? nullptr : reinterpret_cast<A*>(base_ + at);
    }
    std::size_t used() const { return used_; }

  private:
    char* base_;
    std::size_t used_ = 0;
};

}  // namespace convnest
