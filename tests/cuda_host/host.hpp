// CUDA as a kernel sees it when g++ compiles it: build.py includes this before every .cu.
// runtime.cpp implements what is only declared here. Light on purpose: it is compiled per variant.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("host_shared")))

#ifdef HOST_THREADS  // one std::thread per CUDA thread, for ThreadSanitizer; else fibers
#define HOST_LOCAL __thread
#else
#define HOST_LOCAL
#endif

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

namespace host {

enum State {
    READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, AT_GROUP_BARRIER, AT_CLUSTER_BARRIER, POLLING, DONE
};
constexpr unsigned WARP = 32, GROUP = 128, SLOT = 64;

struct Thread;
extern HOST_LOCAL Thread* current;
extern HOST_LOCAL uint3 thread_index;
extern HOST_LOCAL unsigned rank;  // of the thread in its block
extern uint3 block_index, block_size, grid_size;

unsigned char* dynamic_shared();
void wait(State barrier, int line);  // until all threads that the barrier gathers are there
void fail(const char* what, int line);
unsigned char* deposit(const void* value, unsigned bytes, int line);  // → 32 slots of SLOT bytes

// A value of every lane of the warp, after all of them have come to this line.
template <class T> struct Lanes {
    const unsigned char* slots;
    const T& operator[](unsigned lane) const {
        return *reinterpret_cast<const T*>(slots + (lane & (WARP - 1)) * SLOT);
    }
};
template <class T> Lanes<T> gather(const T& value, int line) {
    static_assert(sizeof(T) <= SLOT, "a lane's value fits its slot");
    return {deposit(&value, sizeof(T), line)};
}
inline unsigned lane() { return rank % WARP; }

// What the instructions of include/ptx.cuh start; async.cpp does it.
void aligned(uintptr_t address, unsigned bytes, const char* what, int line);
void copy_later(uintptr_t to, const void* from, unsigned bytes, unsigned valid, int line);
void commit_copies();
void wait_copies(size_t pending);
void barrier_init(uintptr_t barrier, unsigned arrivals, int line);
void barrier_arrive(uintptr_t barrier, unsigned bytes, int line);
void barrier_arrive_remote(uintptr_t barrier, int line);
bool barrier_passed(uintptr_t barrier, unsigned parity);
void load_box_later(uintptr_t to, const void* map, uintptr_t barrier, int x, int y, int line);
void store_box_later(const void* map, uintptr_t from, int x, int y, int line);
void commit_stores();
void wait_stores(size_t pending, bool written);
unsigned cluster_rank();
uintptr_t in_cluster(uintptr_t address, unsigned rank, int line);
void product_later(float* d, unsigned columns, uintptr_t a, uintptr_t b, bool a_by_k, bool b_by_k,
                   float (*value)(unsigned), int keep, unsigned bytes = 2);
void commit_products(int line);
void wait_products(size_t pending, int line);
unsigned short to_bf16(float x);
unsigned short to_finite_bf16(float x);
float from_bits(unsigned bits);
float from_bf16(unsigned bits);
unsigned short to_fp16(float x);
float from_fp16(unsigned bits);
unsigned to_tf32(unsigned bits);
float from_tf32(unsigned bits);
void mma16(float* d, const unsigned* a, const unsigned* b, float (*value)(unsigned), int line);
void mma_tf32(float* d, const unsigned* a, const unsigned* b, int line);

using Body = void (*)(void** arguments);
int run(Body body, void** arguments, const unsigned* grid, const unsigned* block, unsigned cluster,
        bool resident, size_t dynamic, unsigned char* shared, unsigned char* shared_end, uint64_t schedule);

template <size_t...> struct Places {};
template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, Places<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, Places<__integer_pack(sizeof...(A))...>());
}
template <class... A> int size(void (*)(A...), unsigned i) {
    const int sizes[] = {static_cast<int>(sizeof(A))..., -1};
    return i < sizeof...(A) ? sizes[i] : -1;
}

}  // namespace host

#define threadIdx (host::thread_index)
#define blockIdx (host::block_index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)

#define __syncthreads() host::wait(host::AT_BLOCK_BARRIER, __LINE__)
#define __syncwarp() host::wait(host::AT_WARP_BARRIER, __LINE__)
#define __threadfence() __atomic_thread_fence(__ATOMIC_SEQ_CST)

// Only whole warps: another mask is an error, as is a lane that comes from another line.
#define HOST_WHOLE(mask) ((mask) == 0xffffffffu ? (void)0 : host::fail("expected a full mask", __LINE__))
#define __shfl_sync(mask, value, from) \
    (HOST_WHOLE(mask), host::gather(value, __LINE__)[static_cast<unsigned>(from)])
#define __shfl_xor_sync(mask, value, bits) \
    (HOST_WHOLE(mask), host::gather(value, __LINE__)[host::lane() ^ (bits)])
#define __shfl_down_sync(mask, value, by) \
    (HOST_WHOLE(mask), \
     host::gather(value, __LINE__)[host::lane() + (by) < 32 ? host::lane() + (by) : host::lane()])
#define __ballot_sync(mask, predicate) \
    (HOST_WHOLE(mask), host::ballot(host::gather<int>(!!(predicate), __LINE__)))
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)

namespace host {
inline unsigned ballot(const Lanes<int>& votes) {
    unsigned bits = 0;
    for (unsigned i = 0; i < WARP; ++i) bits |= static_cast<unsigned>(votes[i] != 0) << i;
    return bits;
}
// Not contracted: the compiler does not see that it is a product.
template <class T> T rounded(T x) {
    asm volatile("" : "+x"(x));
    return x;
}
template <class T> T exchange_min(T* place, T value) {
    T old = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(place, &old, value, false, 5, 5)) {}
    return old;
}
template <class T> T exchange_max(T* place, T value) {
    T old = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (value > old && !__atomic_compare_exchange_n(place, &old, value, false, 5, 5)) {}
    return old;
}
}  // namespace host

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
inline int atomicMin(int* p, int v) { return host::exchange_min(p, v); }
inline long long atomicMin(long long* p, long long v) { return host::exchange_min(p, v); }
inline unsigned atomicMax(unsigned* p, unsigned v) { return host::exchange_max(p, v); }
inline int atomicExch(int* p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }

inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

extern "C" {
extern unsigned char __start_host_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_host_shared[] __attribute__((weak, visibility("hidden")));
}

// How Python calls a kernel: run_NAME, and the size of each argument: size_NAME.
// A cluster's blocks run at the same time, and with `resident` those of the whole grid.
#define HOST_KERNEL(name, cluster, resident) \
    extern "C" int run_##name(void** arguments, const unsigned* grid, const unsigned* block, \
                              size_t dynamic, uint64_t schedule) { \
        return host::run([](void** a) { host::call(&name, a); }, arguments, grid, block, cluster, resident, \
                         dynamic, __start_host_shared, __stop_host_shared, schedule); \
    } \
    extern "C" int size_##name(unsigned i) { return host::size(&name, i); }
