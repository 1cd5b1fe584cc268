// A hash of weights, by which the cache of packed weights tells a change (cpu/_packed.py).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace convnest {

// Two sums of the words of a stretch, the second one weighted by position, in independent lanes, so
// that it runs at the speed of memory. One word that changes is always seen.
inline std::uint64_t sum_words(const char* memory, std::int64_t words) {
    typedef std::uint32_t Lanes __attribute__((vector_size(64)));
    constexpr std::int64_t kLanes = sizeof(Lanes) / 4;
    Lanes sum = {}, weighted = {};
    std::int64_t i = 0;
    for (; i + kLanes <= words; i += kLanes) {
        Lanes block;
        std::memcpy(&block, memory + i * 4, sizeof block);
        sum += block;
        weighted += sum;
    }
    std::uint64_t hash = 1469598103934665603u;
    const auto add = [&](std::uint32_t word) { hash = (hash ^ word) * 1099511628211u; };
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        add(sum[lane]);
        add(weighted[lane]);
    }
    for (; i < words; ++i) {
        std::uint32_t word;
        std::memcpy(&word, memory + i * 4, sizeof word);
        add(word);
    }
    return hash;
}

// Of 64 words of each stretch, spread evenly; or of all.
inline std::uint64_t hash_words(const std::array<std::uintptr_t, 3>& addresses,
                                const std::array<std::int64_t, 3>& bytes, bool all) {
    constexpr std::int64_t kWords = 64;
    std::uint64_t hash = 1469598103934665603u;
    for (std::size_t i = 0; i < addresses.size(); ++i) {
        const char* memory = reinterpret_cast<const char*>(addresses[i]);
        const std::int64_t words = bytes[i] / 4, taken = words < kWords ? words : kWords;
        if (all) {
            hash = (hash ^ sum_words(memory, words)) * 1099511628211u;
            // 16-bit weights may leave half a word.
            for (std::int64_t k = words * 4; k < bytes[i]; ++k) {
                hash = (hash ^ static_cast<unsigned char>(memory[k])) * 1099511628211u;
            }
            continue;
        }
        for (std::int64_t k = 0; k < taken; ++k) {
            std::uint32_t word;
            std::memcpy(&word, memory + words * k / taken * 4, sizeof word);
            hash = (hash ^ word) * 1099511628211u;
        }
    }
    return hash;
}

}  // namespace convnest
