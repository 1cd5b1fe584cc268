#include "parallel.h"

#include "partition.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

namespace convnest {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// ---- scratch ----

class Arena {
  public:
    ~Arena() { std::free(data_); }

    // Null when there is no memory.
    char* reserve(std::size_t bytes) {
        if (bytes <= capacity_) return data_;
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
        // Large blocks are asked for in huge pages: the rings are walked with long strides.
        const std::size_t page = bytes >= kHugePage ? kHugePage : kSmallAlignment;
        const std::size_t rounded = (bytes + page - 1) / page * page;
        data_ = static_cast<char*>(std::aligned_alloc(page, rounded));
        if (data_ == nullptr) return nullptr;
        ask_for_huge_pages(data_, rounded);
        capacity_ = rounded;
        return data_;
    }

    void trim() {
        if (capacity_ <= kKeptScratchBytes) return;
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
    }

  private:
    static constexpr std::size_t kSmallAlignment = 4096;
    char* data_ = nullptr;
    std::size_t capacity_ = 0;
};

// Two arenas: the thread that makes a call also runs some of its units.
thread_local Arena worker_arena;
thread_local Arena call_arena;

// ---- a job, and the ways to run it ----

// Each worker has a part of every phase, and takes of others' parts once it is done: so it meets
// the same slices of data in one phase after the other, in its own caches. No worker takes a unit
// of a phase before all of those before are taken, so what it waits for is being done.
class Job {
  public:
    Job(const Units* phases, std::size_t count, int threads) : phases_(phases), count_(count) {
        std::int64_t most = 0;
        for (std::size_t i = 0; i < count; ++i) {
            if (phases[i].count > most) most = phases[i].count;
            if (phases[i].scratch_bytes > scratch_bytes_) scratch_bytes_ = phases[i].scratch_bytes;
        }
        workers_ = most < threads ? most : threads;
        parts_ = std::vector<Part>(static_cast<std::size_t>(workers_));
    }

    // At most as many as the widest phase has units.
    std::int64_t workers() const { return workers_; }
    bool out_of_memory() const { return out_of_memory_; }

    // What the i-th worker does, until no unit is left to take.
    void work(std::int64_t worker) noexcept {
        char* scratch = worker_arena.reserve(scratch_bytes_ + 1);
        if (scratch == nullptr) {
            out_of_memory_ = true;
            return;
        }
        std::int64_t ended = 0;  // of the phases before
        for (std::size_t i = 0; i < count_; ++i) {
            const Units& phase = phases_[i];
            bool prepared = phase.prepare == nullptr;
            for (std::int64_t k = 0; k < workers_; ++k) {
                const std::int64_t part = (worker + k) % workers_;
                for (std::int64_t unit; (unit = take(part, i)) >= 0;) {
                    wait_for(ended);
                    if (!prepared) phase.prepare(scratch, phase.context);
                    prepared = true;
                    phase.run(phase.first + unit, scratch, phase.context);
                    if (ended_.fetch_add(1) + 1 == ended + phase.count) {
                        const std::lock_guard<std::mutex> lock(mutex_);
                        wake_.notify_all();
                    }
                }
            }
            ended += phase.count;
        }
        worker_arena.trim();
    }

  private:
    // The phase that a part is in, and how many of its units are taken: alone on a cache line.
    struct alignas(64) Part {
        std::atomic<std::uint64_t> state{0};
    };

    // The next unit of a part of a phase; -1: none is left.
    std::int64_t take(std::int64_t part, std::uint64_t phase) {
        const Range units = part_of(phases_[phase].count, workers_, part);
        std::atomic<std::uint64_t>& state = parts_[static_cast<std::size_t>(part)].state;
        for (std::uint64_t seen = state;;) {
            // A part that is still in an earlier phase has nothing left there.
            const std::uint64_t taken = seen >> 32 == phase ? seen & 0xffffffffu : 0;
            if (seen >> 32 > phase || units.begin + static_cast<std::int64_t>(taken) >= units.end) {
                return -1;
            }
            if (state.compare_exchange_weak(seen, phase << 32 | (taken + 1))) {
                return units.begin + static_cast<std::int64_t>(taken);
            }
        }
    }

    // Until the first `units` have ended. Awake for as long as it would take to fall asleep and be
    // woken up, then asleep: the core may have other work.
    void wait_for(std::int64_t units) {
        if (ended_ >= units) return;
        const auto start = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(100)) {
            if (ended_ >= units) return;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return ended_ >= units; });
    }

    const Units* phases_;
    const std::size_t count_;
    std::int64_t workers_;
    std::size_t scratch_bytes_ = 0;
    std::vector<Part> parts_;
    std::atomic<std::int64_t> ended_{0};
    std::atomic<bool> out_of_memory_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Our own pool. One job at a time: a second caller runs its job alone.
class Pool {
  public:
    explicit Pool(int threads) : process_(getpid()) {
        for (int i = 1; i < threads; ++i) {
            try {
                workers_.emplace_back([this, i] { work(i); });
            } catch (const std::system_error&) {
                break;  // fewer threads, same results
            }
        }
    }

    ~Pool() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }

    bool belongs_to_this_process() const { return process_ == getpid(); }

    void run(Job& job) {
        const std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return job.work(0);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            ++generation_;
        }
        wake_.notify_all();
        job.work(0);
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;  // a worker that wakes up late finds nothing
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    void work(std::int64_t worker) {
        std::int64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
            if (stop_) return;
            seen = generation_;
            if (job_ == nullptr) continue;
            Job& job = *job_;
            ++active_;
            lock.unlock();
            job.work(worker % job.workers());
            lock.lock();
            if (--active_ == 0) done_.notify_all();
        }
    }

    const pid_t process_;
    std::vector<std::thread> workers_;
    std::mutex busy_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    Job* job_ = nullptr;
    std::int64_t generation_ = 0;
    int active_ = 0;
    bool stop_ = false;
};

using ParallelFn = void (*)(std::int64_t begin, std::int64_t end, void* context);
using TorchParallelFor = std::int32_t (*)(std::int64_t, std::int64_t, std::int64_t, ParallelFn,
                                          void*);
using TorchNumThreads = std::int32_t (*)(std::uint32_t*);

std::atomic<TorchParallelFor> torch_parallel_for{nullptr};
std::atomic<TorchNumThreads> torch_num_threads{nullptr};

std::atomic<int> own_threads{0};  // 0: as many as there are processors
std::mutex pool_mutex;
// Never destroyed: workers may still wait in it when the process exits, and after a fork the
// child's copy has no threads to join.
Pool* pool = nullptr;
std::atomic<int> pool_users{0};

int own_num_threads() {
    const int wanted = own_threads.load();
    if (wanted > 0) return wanted;
    const unsigned processors = std::thread::hardware_concurrency();
    return processors > 0 ? static_cast<int>(processors) : 1;
}

Pool& own_pool() {
    const std::lock_guard<std::mutex> lock(pool_mutex);
    if (pool != nullptr && !pool->belongs_to_this_process()) {
        pool = nullptr;
        pool_users = 0;
    }
    if (pool == nullptr) pool = new Pool(own_num_threads());
    ++pool_users;
    return *pool;
}

void run(Job&& job) {
    if (job.workers() <= 1) {
        if (job.workers() == 1) job.work(0);
    } else if (const auto parallel_for = torch_parallel_for.load()) {
        const auto body = [](std::int64_t begin, std::int64_t, void* context) {
            static_cast<Job*>(context)->work(begin);
        };
        if (parallel_for(0, job.workers(), 1, body, &job) != 0) job.work(0);
    } else {
        own_pool().run(job);
        --pool_users;
    }
    if (job.out_of_memory()) throw std::bad_alloc();
}

}  // namespace

void run_units(const Units& units) { run(Job(&units, 1, num_threads())); }

Phases::Phases() = default;
Phases::~Phases() = default;
void Phases::add(const Units& units) { phases_.push_back(units); }
void Phases::run() const { convnest::run(Job(phases_.data(), phases_.size(), num_threads())); }

void run_phases(std::initializer_list<Units> phases) {
    run(Job(phases.begin(), phases.size(), num_threads()));
}

int num_threads() {
    if (const auto get = torch_num_threads.load()) {
        std::uint32_t count = 1;
        return get(&count) == 0 && count > 0 ? static_cast<int>(count) : 1;
    }
    return own_num_threads();
}

void set_num_threads(int count) {
    if (torch_parallel_for.load() != nullptr) {
        throw std::logic_error("the kernels run on torch's threads: use torch.set_num_threads");
    }
    const std::lock_guard<std::mutex> lock(pool_mutex);
    if (pool != nullptr && pool->belongs_to_this_process()) {
        if (pool_users.load() != 0) {
            throw std::logic_error("the thread count cannot change while a kernel runs");
        }
        delete pool;
    }
    pool = nullptr;
    own_threads = count;
}

void use_thread_pool(std::uintptr_t parallel_for, std::uintptr_t get_num_threads) {
    torch_parallel_for = reinterpret_cast<TorchParallelFor>(parallel_for);
    torch_num_threads = reinterpret_cast<TorchNumThreads>(get_num_threads);
}

void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(memory);
    const std::size_t before = (kHugePage - at % kHugePage) % kHugePage;
    if (bytes < before + kHugePage) return;
    const std::size_t whole = (bytes - before) / kHugePage * kHugePage;
    madvise(static_cast<char*>(memory) + before, whole, MADV_HUGEPAGE);
#endif
}

CallScratch::CallScratch(std::size_t bytes) : data_(call_arena.reserve(bytes + 1)) {
    if (data_ == nullptr) throw std::bad_alloc();
}

CallScratch::~CallScratch() { call_arena.trim(); }

}  // namespace convnest
