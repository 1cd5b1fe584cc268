// Loads and stores of kernels. On a GPU each is the plain access; under the host emulation each is
// checked: bounds, alignment, shared memory that nothing wrote, and accesses of two threads that no
// barrier orders. A kernel touches memory through these functions only.
#pragma once

#include "common/launch.cuh"

namespace convnest::cuda {

// Reads what nobody writes during the launch. Volatile, so that a prefetch stays where it stands.
__device__ __forceinline__ uint4 load_global(const uint4* address) {
#if defined(__CUDACC__)
    uint4 v;
    asm volatile("ld.global.nc.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
#else
    return emulation::load_global(address);
#endif
}

template <class T>
__device__ __forceinline__ T load_global(const T* address) {
#if defined(__CUDACC__)
    return __ldg(address);
#else
    return emulation::load_global(address);
#endif
}

// Reads what the same thread, and no other, may overwrite in this launch.
__device__ __forceinline__ uint4 load_global_in_place(const uint4* address) {
#if defined(__CUDACC__)
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
#else
    return emulation::load_global(address);
#endif
}

template <class T>
__device__ __forceinline__ void store_global(T* address, T value) {
#if defined(__CUDACC__)
    *address = value;
#else
    emulation::store_global(address, value);
#endif
}

// `address` may point at any type: planes of 16-bit elements are read as words and vectors.
template <class T>
__device__ __forceinline__ T load_shared(const void* address) {
#if defined(__CUDACC__)
    return *static_cast<const T*>(address);
#else
    return emulation::load_shared<T>(address);
#endif
}

template <class T>
__device__ __forceinline__ void store_shared(void* address, T value) {
#if defined(__CUDACC__)
    *static_cast<T*>(address) = value;
#else
    emulation::store_shared(address, value);
#endif
}

// Keeps the compiler from moving accesses across: it trades registers for latency where there are
// none to spare. Nothing happens at run time.
__device__ __forceinline__ void keep_order() {
#if defined(__CUDACC__)
    asm volatile("" ::: "memory");
#endif
}

// The value itself. What follows from it is computed where it stands, and not held in registers
// across a loop.
__device__ __forceinline__ int recompute_from(int value) {
#if defined(__CUDACC__)
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// 16 bytes, or a float, from global to shared memory, seen by this thread after async_copy_wait(),
// and by the others after a barrier behind that. Zeros unless `present`, and the address is not
// read then.
__device__ __forceinline__ void async_copy16(void* shared, const void* global,
                                             bool present = true) {
#if defined(__CUDACC__)
    asm volatile(
        "{\n\t"
        ".reg .pred absent;\n\t"
        "setp.eq.u32 absent, %2, 0;\n\t"
        "cp.async.cg.shared.global [%0], [%1], 16, absent;\n\t"
        "}" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(global), "r"(static_cast<unsigned>(present))
        : "memory");
#else
    emulation::async_copy16(shared, global, present);
#endif
}

__device__ __forceinline__ void async_copy_float(float* shared, const float* global, bool present) {
#if defined(__CUDACC__)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(present ? 4 : 0)
                 : "memory");
#else
    emulation::async_copy_float(shared, global, present);
#endif
}

// Asks for the 32 bytes around `address` to come to L2, if `present`: no register waits for them.
__device__ __forceinline__ void prefetch_global(const void* address, bool present) {
#if defined(__CUDACC__)
    asm volatile(
        "{\n\t"
        ".reg .pred present;\n\t"
        "setp.ne.u32 present, %1, 0;\n\t"
        "@present prefetch.global.L2 [%0];\n\t"
        "}" ::"l"(address),
        "r"(static_cast<unsigned>(present)));
#else
    if (present) emulation::check_global_read(address, 16);
#endif
}

__device__ __forceinline__ void async_copy_commit() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulation::async_copy_commit();
#endif
}

// Waits until at most kGroups of this thread's committed groups are still under way.
template <int kGroups>
__device__ __forceinline__ void async_copy_wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
    emulation::async_copy_wait(kGroups);
#endif
}

}  // namespace convnest::cuda
