// Runs a grid: block after block, the threads of a block in turns, from barrier to barrier; and
// reports a block that cannot go on. Included by cuda_model.h.
#pragma once

namespace emulation {

// How many threads wait where; for the two reports below.
inline std::string census() {
    std::map<std::string, int> counts;
    for (int i = 0; i < machine.thread_count; ++i) {
        const Thread& t = machine.threads[i];
        ++counts[t.state == State::done ? "have exited" : std::string("wait at ") + t.where];
    }
    std::string text;
    for (const auto& [what, count] : counts) {
        text += (text.empty() ? "" : ", ") + std::to_string(count) + " threads " + what;
    }
    return text;
}

inline void start_threads() {
    Machine& m = machine;
    while (static_cast<int>(m.threads.size()) < m.thread_count) {
        Thread thread;
        thread.stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        mprotect(thread.stack, kPageBytes, PROT_NONE);
        m.threads.push_back(std::move(thread));
    }
    for (int i = 0; i < m.thread_count; ++i) {
        Thread& t = m.threads[i];
        const unsigned n = static_cast<unsigned>(i);
        t.linear = i;
        t.index = {n % m.block.x, n / m.block.x % m.block.y, n / (m.block.x * m.block.y)};
        t.state = State::ready;
        t.where = "";
        t.async_groups.clear();
        t.async_open.clear();
        void** stack = reinterpret_cast<void**>(t.stack + kStackBytes - 64);
        *--stack = nullptr;
        *--stack = reinterpret_cast<void*>(thread_entry);
        stack -= 6;  // the registers that the first switch pops
        std::fill(stack, stack + 6, nullptr);
        t.stack_pointer = stack;
    }
}

// Lets a block that waits as a whole at one barrier go on; reports any other standstill.
inline void release_barrier() {
    Machine& m = machine;
    m.current = nullptr;
    const char* site = nullptr;
    bool together = true;
    for (int i = 0; i < m.thread_count; ++i) {
        const Thread& t = m.threads[i];
        if (t.state == State::in_warp) fail("deadlock: " + census());
        if (site == nullptr && t.state == State::at_barrier) site = t.where;
        together &= t.state == State::at_barrier && std::strcmp(t.where, site) == 0;
    }
    if (!together) fail("divergent barrier: " + census());
    ++m.epoch;
    for (int i = 0; i < m.thread_count; ++i) m.threads[i].state = State::ready;
}

inline void run_block(std::mt19937& random) {
    Machine& m = machine;
    ++m.epoch;
    m.block_epoch = m.epoch;
    poison_shared_memory();
    start_threads();
    std::vector<int> order(m.thread_count);
    for (int i = 0; i < m.thread_count; ++i)
        order[i] = m.settings.seed == 1 ? m.thread_count - 1 - i : i;
    int alive = m.thread_count;
    while (alive > 0) {
        if (m.settings.seed > 1) std::shuffle(order.begin(), order.end(), random);
        bool progress = false;
        for (int i : order) {
            Thread& t = m.threads[i];
            if (t.state != State::ready) continue;
            progress = true;
            m.current = &t;
            convnest_emulation_switch(&m.scheduler_stack_pointer, t.stack_pointer);
            if (!m.fault.empty()) throw Fault(m.fault);
            if (t.state == State::done) --alive;
        }
        if (alive > 0 && !progress) release_barrier();
    }
}

// Runs a kernel over a grid; the body calls it with its arguments. Throws Fault.
inline void run_grid(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
                     const std::function<void()>& body) {
    Machine& m = machine;
    m.kernel = kernel;
    m.grid = grid;
    m.block = block;
    m.thread_count = static_cast<int>(block.x * block.y * block.z);
    m.shared_bytes = shared_bytes;
    m.body = &body;
    m.fault.clear();
    m.current = nullptr;
    m.block_index = {};
    if (m.thread_count < 1 || m.thread_count > kMaxThreads)
        fail("a block of " + std::to_string(m.thread_count) + " threads");
    if (shared_bytes > kMaxSharedBytes)
        fail(std::to_string(shared_bytes) + " bytes of shared memory");
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
        fail("an empty or too large grid");
    begin_launch();
    std::mt19937 random(m.settings.seed);
    std::vector<std::uint64_t> order(static_cast<std::uint64_t>(grid.x) * grid.y * grid.z);
    for (std::uint64_t i = 0; i < order.size(); ++i)
        order[i] = m.settings.seed == 1 ? order.size() - 1 - i : i;
    if (m.settings.seed > 1) std::shuffle(order.begin(), order.end(), random);
    for (const std::uint64_t i : order) {
        m.block_index = {static_cast<unsigned>(i % grid.x),
                         static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
        run_block(random);
    }
}

}  // namespace emulation
