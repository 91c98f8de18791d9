// The words that differ between NVRTC and the host compiler of the tests, and every PTX instruction.
// Each wrapper has a PTX body, which a GPU runs, and a plain C++ body, which the emulator runs; the
// layouts of both are in tests/kernels/test_ptx.py, which holds them against NumPy.
//
// cp.async, ldmatrix and mma.sync need sm_80; stmatrix, mbarrier, TMA and clusters sm_90;
// multicast, wgmma and setmaxnreg sm_90a.
#pragma once

using u32 = unsigned;
using u64 = unsigned long long;

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
using shared_t = u32;  // an address in shared memory
DEVICE shared_t shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }
#else
#define DEVICE inline
#define DYNAMIC_SHARED(name) unsigned char* const name = host::dynamic_shared()
using shared_t = uintptr_t;
DEVICE shared_t shared_address(const void* p) { return reinterpret_cast<shared_t>(p); }
#endif

// ---- 16-bit floats and tf32, as bits

// The bfloat16 nearest to x, ties to even.
DEVICE unsigned short to_bf16(float x) {
#ifdef __CUDACC__
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    return host::to_bf16(x);
#endif
}

DEVICE float from_bf16(unsigned short bits) {
#ifdef __CUDACC__
    return __uint_as_float(u32(bits) << 16);
#else
    return host::from_bf16(bits);
#endif
}

// Two of them, `low` in the lower half.
DEVICE u32 to_bf16_pair(float low, float high) {
#ifdef __CUDACC__
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_bf16(low) | u32(to_bf16(high)) << 16;
#endif
}

// The same, but the largest finite number where that would be infinite.
DEVICE u32 to_finite_bf16_pair(float low, float high) {
#ifdef __CUDACC__
    u32 pair;
    asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return host::to_finite_bf16(low) | u32(host::to_finite_bf16(high)) << 16;
#endif
}

DEVICE float as_float(u32 bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    return host::from_bits(bits);
#endif
}

// The float16 nearest to x, ties to even; infinite beyond 65504.
DEVICE unsigned short to_fp16(float x) {
#ifdef __CUDACC__
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    return host::to_fp16(x);
#endif
}

DEVICE float from_fp16(unsigned short bits) {
#ifdef __CUDACC__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    return host::from_fp16(bits);
#endif
}

// A float32 as the nearest tf32, ties away from zero (sm_80).
DEVICE u32 to_tf32(u32 x) {
#ifdef __CUDACC__
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(__uint_as_float(x)));
    return bits;
#else
    return host::to_tf32(x);
#endif
}

DEVICE u32 as_bits(float x) {
#ifdef __CUDACC__
    return __float_as_uint(x);
#else
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
#endif
}

// The product as it is rounded: never part of a fused multiply-add.
DEVICE float rounded_product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return host::rounded(a * b);
#endif
}
DEVICE double rounded_product(double a, double b) {
#ifdef __CUDACC__
    return __dmul_rn(a, b);
#else
    return host::rounded(a * b);
#endif
}

// ---- a maximum that many threads keep, whoever comes first

// *cell becomes `value` where that is more. Most often it is not: a look costs less than an atomic.
DEVICE void raise_to(u32* cell, u32 value) {
#ifdef __CUDACC__
    if (*static_cast<volatile u32*>(cell) < value) atomicMax(cell, value);
#else
    if (__atomic_load_n(cell, __ATOMIC_RELAXED) < value) atomicMax(cell, value);
#endif
}

// ---- cp.async: global to shared memory past the registers (sm_80)

// Copy 16 bytes, of which all but the first `valid` become 0; both addresses on 16 bytes.
DEVICE void copy_async_16(shared_t to, const void* from, u32 valid) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
#else
    host::copy_later(to, from, 16, valid, __LINE__);
#endif
}

// Copy 4 bytes, or put 0 there; both addresses on 4 bytes.
DEVICE void copy_async_4(shared_t to, const void* from, u32 valid) {
#ifdef __CUDACC__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
#else
    host::copy_later(to, from, 4, valid, __LINE__);
#endif
}

// Close this thread's group of copies.
DEVICE void copy_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    host::commit_copies();
#endif
}

// Wait until at most PENDING of this thread's groups are not done.
template <int PENDING> DEVICE void copy_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    host::wait_copies(PENDING);
#endif
}

// ---- warp matrices (sm_80)

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
// r[i] of lane l: elements 2 (l % 4) and the next one of row l / 4 of matrix i.
DEVICE void ldmatrix_x4(u32 (&r)[4], shared_t row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
#else
    host::aligned(row, 16, "ldmatrix", __LINE__);
    const auto rows = host::gather(row, __LINE__);
    for (u32 i = 0; i < 4; ++i)
        r[i] = *reinterpret_cast<const u32*>(rows[i * 8 + host::lane() / 4] + host::lane() % 4 * 4);
    host::wait(host::AT_WARP_BARRIER, __LINE__);  // no lane overwrites what another has yet to read
#endif
}

// The same matrices transposed.
DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], shared_t row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
#else
    host::aligned(row, 16, "ldmatrix", __LINE__);
    const auto rows = host::gather(row, __LINE__);
    const u32 column = host::lane() / 4;
    for (u32 i = 0; i < 4; ++i) {
        u32 halves[2];
        for (u32 h = 0; h < 2; ++h)
            halves[h] = reinterpret_cast<const unsigned short*>(rows[i * 8 + host::lane() % 4 * 2 + h])[column];
        r[i] = halves[0] | halves[1] << 16;
    }
    host::wait(host::AT_WARP_BARRIER, __LINE__);
#endif
}

// The reverse of ldmatrix_x4: r[i] of lane l goes to elements 2 (l % 4) and the next one of row l / 4
// of matrix i; lane l gives the address of row l % 8 of matrix l / 8 (sm_90).
DEVICE void stmatrix_x4(shared_t row, const u32 (&r)[4]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#else
    host::aligned(row, 16, "stmatrix", __LINE__);
    const auto rows = host::gather(row, __LINE__);
    for (u32 i = 0; i < 4; ++i)
        *reinterpret_cast<u32*>(rows[i * 8 + host::lane() / 4] + host::lane() % 4 * 4) = r[i];
    host::wait(host::AT_WARP_BARRIER, __LINE__);  // no lane reads what another has yet to write
#endif
}

// The same matrices transposed.
DEVICE void stmatrix_x4_transposed(shared_t row, const u32 (&r)[4]) {
#ifdef __CUDACC__
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#else
    host::aligned(row, 16, "stmatrix", __LINE__);
    const auto rows = host::gather(row, __LINE__);
    const u32 column = host::lane() / 4;
    for (u32 i = 0; i < 4; ++i)
        for (u32 h = 0; h < 2; ++h)
            reinterpret_cast<unsigned short*>(rows[i * 8 + host::lane() % 4 * 2 + h])[column] =
                static_cast<unsigned short>(r[i] >> 16 * h);
    host::wait(host::AT_WARP_BARRIER, __LINE__);
#endif
}

// d += a b for a (16 x 16) and b (16 x 8) of bfloat16, d (16 x 8) of float32. Lane l holds
// a: rows l / 4 (+ 8), columns 2 (l % 4) (+ 1, + 8, + 9); b: rows 2 (l % 4) ..., column l / 4;
// d: rows l / 4 (+ 8), columns 2 (l % 4) (+ 1).
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    host::mma16(d, a, b, host::from_bf16, __LINE__);
#endif
}

// The same for float16.
DEVICE void mma_fp16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    host::mma16(d, a, b, host::from_fp16, __LINE__);
#endif
}

// d += a b for a (16 x 8) and b (8 x 8) of tf32, which are float32 whose last 13 bits are ignored.
// Lane l holds a: rows l / 4 (+ 8), columns l % 4 (+ 4); b: rows l % 4 (+ 4), column l / 4.
DEVICE void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    host::mma_tf32(d, a, b, __LINE__);
#endif
}

// ---- mbarrier: a barrier in shared memory that also counts bytes (sm_90)

// Its phase ends when `arrivals` threads have come and no expected byte is missing.
DEVICE void barrier_init(shared_t barrier, u32 arrivals) {
#ifdef __CUDACC__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#else
    host::barrier_init(barrier, arrivals, __LINE__);
#endif
}

// After the inits, before anyone else uses the barriers.
DEVICE void barrier_init_fence() {
#ifdef __CUDACC__
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Arrive, and expect `bytes` more.
DEVICE void barrier_expect(shared_t barrier, u32 bytes) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
    host::barrier_arrive(barrier, bytes, __LINE__);
#endif
}

DEVICE void barrier_arrive(shared_t barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
    host::barrier_arrive(barrier, 0, __LINE__);
#endif
}

// Wait until the phase of this parity is over; a new barrier's phases have parity 0, 1, 0, ...
DEVICE void barrier_wait(shared_t barrier, u32 parity) {
#ifdef __CUDACC__
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
#else
    while (!host::barrier_passed(barrier, parity)) host::wait(host::POLLING, __LINE__);
#endif
}

// ---- TMA: boxes of a tensor between global and shared memory (sm_90)

// What cuTensorMapEncodeTiled makes on the host; a parameter `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap { u64 opaque[16]; };

// Fill shared memory, on 128 bytes (1024 with a swizzle), with the box at column x, row y of the
// tensor; what lies outside is 0. Its bytes are counted off `barrier`.
DEVICE void load_box(shared_t to, const TensorMap* map, shared_t barrier, int x, int y) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y) : "memory");
#else
    host::load_box_later(to, map, barrier, x, y, __LINE__);
#endif
}

// The reverse: the box in shared memory goes to column x, row y; what would lie outside is dropped.
// It belongs to the group that this thread closes next.
DEVICE void store_box(const TensorMap* map, shared_t from, int x, int y) {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(map), "r"(from), "r"(x), "r"(y) : "memory");
#else
    host::store_box_later(map, from, x, y, __LINE__);
#endif
}

DEVICE void store_box_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#else
    host::commit_stores();
#endif
}

// Wait until all but PENDING of this thread's groups have been read: shared memory is free again.
// A block must not end before.
template <int PENDING> DEVICE void store_box_wait_read() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
#else
    host::wait_stores(PENDING, false);
#endif
}

// Wait until all but PENDING of this thread's groups are written.
template <int PENDING> DEVICE void store_box_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
#else
    host::wait_stores(PENDING, true);
#endif
}

// What threads wrote to shared memory is seen by TMA and wgmma after this.
DEVICE void fence_shared_async() {
#ifdef __CUDACC__
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- clusters: blocks side by side in x that reach one another's shared memory (sm_90)
//
// A kernel says `__cluster_dims__(N, 1, 1)`; its grid is a multiple of N. The emulator knows the
// dynamic shared memory of the other blocks, not the static.

DEVICE u32 cluster_rank() {
#ifdef __CUDACC__
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return host::cluster_rank();
#endif
}

// All threads of the cluster meet; what they wrote to shared memory is seen by all.
DEVICE void cluster_sync() {
#ifdef __CUDACC__
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    host::wait(host::AT_CLUSTER_BARRIER, __LINE__);
#endif
}

// Where block `rank` of the cluster has what this block has at `address`.
DEVICE shared_t in_cluster(shared_t address, u32 rank) {
#ifdef __CUDACC__
    shared_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
#else
    return host::in_cluster(address, rank, __LINE__);
#endif
}

// Arrive at a barrier of another block, whose address `in_cluster` gave. What this thread wrote before
// need not be seen there.
DEVICE void barrier_arrive_remote(shared_t barrier) {
#ifdef __CUDACC__
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
    host::barrier_arrive_remote(barrier, __LINE__);
#endif
}

// load_box into every block whose bit is in `blocks`, each counting the bytes off its own barrier
// (sm_90a).
DEVICE void load_box_multicast(shared_t to, const TensorMap* map, shared_t barrier, int x, int y, u32 blocks) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y),
        "h"(static_cast<unsigned short>(blocks)) : "memory");
#else
    for (u32 rank = 0; blocks >> rank; ++rank)
        if (blocks >> rank & 1)
            host::load_box_later(host::in_cluster(to, rank, __LINE__), map,
                                 host::in_cluster(barrier, rank, __LINE__), x, y, __LINE__);
#endif
}

// ---- wgmma: a warpgroup's product from shared memory (sm_90a)

// Describes rows of 128 bytes with the 128-byte swizzle, K running along them, groups of 8 rows 1024
// bytes apart. What an instruction takes of K is 32 bytes; the next ones follow.
DEVICE u64 rows_of_128(shared_t address) {
#ifdef __CUDACC__
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
#else
    return address;
#endif
}

// The same with K running down: the 64 elements of a row belong to one k each, the next 64 lie 8192
// bytes further. The next 16 rows of K are 2048 bytes further.
DEVICE u64 columns_of_128(shared_t address) {
#ifdef __CUDACC__
    return u64((address & 0x3ffff) >> 4) | u64(8192 >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
#else
    return address;
#endif
}

// Registers may be read by wgmma, or again by this thread, after this.
DEVICE void wgmma_fence() {
#ifdef __CUDACC__
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
    host::wait(host::AT_GROUP_BARRIER, __LINE__);
#endif
}

DEVICE void wgmma_commit() {
#ifdef __CUDACC__
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
    host::commit_products(__LINE__);
#endif
}

// Wait until at most PENDING groups are not done; only then are their d written.
template <int PENDING> DEVICE void wgmma_wait() {
#ifdef __CUDACC__
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#else
    host::wait_products(PENDING, __LINE__);
#endif
}

#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), \
              "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define NAMES_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
                 "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_64 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48," \
                 "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_96 NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80," \
                 "%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_128 NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
                  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d = a bᵀ (+ d, with keep) for a (64 x 16) and b (N x 16), both rows_of_128 or, with BY_K,
// columns_of_128. Thread t of the warpgroup holds rows 16 (t / 32) + t % 32 / 4 (+ 8) and columns
// 8 j + 2 (t % 4) (+ 1): d[4 j + 2 h + e] is row + 8 h, column + e.
#ifdef __CUDACC__
#define WGMMA(NAME, KIND, VALUE, N, NAMES, A, B, KEEP, A_WAY, B_WAY, ...) \
    template <bool A_BY_K, bool B_BY_K> DEVICE void NAME(float (&d)[N / 2], u64 a, u64 b, int keep) { \
        asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." KIND "." KIND " {" NAMES "}, %" #A \
                     ", %" #B ", keep, 1, 1, %" #A_WAY ", %" #B_WAY ";\n}" \
                     : __VA_ARGS__ : "l"(a), "l"(b), "r"(keep), "n"(int(A_BY_K)), "n"(int(B_BY_K))); \
    }
#else
#define WGMMA(NAME, KIND, VALUE, N, ...) \
    template <bool A_BY_K, bool B_BY_K> DEVICE void NAME(float (&d)[N / 2], u64 a, u64 b, int keep) { \
        host::product_later(d, N, a, b, A_BY_K, B_BY_K, VALUE, keep); \
    }
#endif
#define WGMMA_EACH(NAME, KIND, VALUE) \
    WGMMA(NAME, KIND, VALUE, 64, NAMES_32, 32, 33, 34, 35, 36, D32(0)) \
    WGMMA(NAME, KIND, VALUE, 128, NAMES_64, 64, 65, 66, 67, 68, D32(0), D32(32)) \
    WGMMA(NAME, KIND, VALUE, 192, NAMES_96, 96, 97, 98, 99, 100, D32(0), D32(32), D32(64)) \
    WGMMA(NAME, KIND, VALUE, 256, NAMES_128, 128, 129, 130, 131, 132, D32(0), D32(32), D32(64), D32(96))
WGMMA_EACH(wgmma_bf16, "bf16", host::from_bf16)
WGMMA_EACH(wgmma_fp16, "f16", host::from_fp16)

// The same for a (64 x 8) and b (N x 8) of tf32, which are float32 whose last 13 bits are ignored. It takes
// both rows_of_128 and nothing else.
#ifdef __CUDACC__
#define WGMMA_TF32(N, NAMES, A, B, KEEP, ...) \
    DEVICE void wgmma_tf32(float (&d)[N / 2], u64 a, u64 b, int keep) { \
        asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #KEEP ", 0;\n" \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k8.f32.tf32.tf32 {" NAMES "}, %" #A ", %" #B \
                     ", keep, 1, 1;\n}" \
                     : __VA_ARGS__ : "l"(a), "l"(b), "r"(keep)); \
    }
#else
#define WGMMA_TF32(N, ...) \
    DEVICE void wgmma_tf32(float (&d)[N / 2], u64 a, u64 b, int keep) { \
        host::product_later(d, N, a, b, false, false, host::from_tf32, keep, 4); \
    }
#endif
WGMMA_TF32(64, NAMES_32, 32, 33, 34, D32(0))
WGMMA_TF32(128, NAMES_64, 64, 65, 66, D32(0), D32(32))
WGMMA_TF32(192, NAMES_96, 96, 97, 98, D32(0), D32(32), D32(64))
WGMMA_TF32(256, NAMES_128, 128, 129, 130, D32(0), D32(32), D32(64), D32(96))

// Give registers of this warpgroup back, or take more: COUNT each, a multiple of 8.
template <int COUNT> DEVICE void give_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT> DEVICE void take_registers() {
#ifdef __CUDACC__
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// The threads of this warpgroup meet, and see what each of them has written; `number` is its own in the
// block, and not 0, which is __syncthreads.
DEVICE void group_sync(int number) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, 128;" ::"r"(number) : "memory");
#else
    if (number != int(host::rank / host::GROUP)) host::fail("group_sync by another warpgroup's number", __LINE__);
    host::wait(host::AT_GROUP_BARRIER, __LINE__);
#endif
}

// ---- turns: blocks of one grid one after the other; all blocks must be resident

// Wait until `turn` is `mine`; what others wrote before they passed it on is seen then.
DEVICE void wait_turn(const u32* turn, u32 mine) {
#ifdef __CUDACC__
    u32 now;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
    while (now != mine);
#else
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != mine) host::wait(host::POLLING, __LINE__);
#endif
}

DEVICE void pass_turn(u32* turn, u32 next) {
#ifdef __CUDACC__
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
#else
    __atomic_store_n(turn, next, __ATOMIC_RELEASE);
#endif
}
