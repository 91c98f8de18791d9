// Sums over lanes, blocks and columns. Their order depends on shapes alone: the same input gives the
// same bits, run after run.
#pragma once
#include "ptx.cuh"

constexpr int THREADS = 256, WARP = 32;  // of a block; as rows.py has them
// Blocks that shall fit on an SM: registers enough that nothing spills.
constexpr int BLOCKS = 2;

// The sum over `lanes` neighbours of a warp, a power of two; known to each of them.
template <class T> DEVICE T lane_sum(T x, int lanes = WARP) {
    for (int bits = lanes / 2; bits; bits /= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
    return x;
}

// The sum over all threads of the block, known to each of them.
template <class T> static DEVICE T block_sum(T x) {
    __shared__ T s_warps[THREADS / WARP];
    x = lane_sum(x);
    __syncthreads();  // the last call's sums may still be read
    if (threadIdx.x % WARP == 0) s_warps[threadIdx.x / WARP] = x;
    __syncthreads();
    T sum = s_warps[0];
    for (int i = 1; i < THREADS / WARP; ++i) sum += s_warps[i];
    return sum;
}

// The sum of the squares of every so-many-th element, in float64, whose range holds the square of any
// float32. All threads of the grid take part; each gets its own share.
static DEVICE double square_share(const real* x, long long size) {
    double sum = 0;
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < size;
         i += gridDim.x * (long long)THREADS)
        sum += double(x[i]) * double(x[i]);
    return sum;
}

// The share of a block.
static DEVICE double square_sum(const real* x, long long size) { return block_sum(square_share(x, size)); }

// The sum of an array, by one block.
static DEVICE double array_sum(const double* terms, long long count) {
    double sum = 0;
    for (long long i = threadIdx.x; i < count; i += THREADS) sum += terms[i];
    return block_sum(sum);
}

// f(i, j, inside) for the rows first ... last - 1 of all columns, `across` threads side by side in a
// row. Whole warps call it, also beyond the last row or column: not `inside` then.
template <class F>
DEVICE void each(long long first, long long last, long long columns, int across, F f) {
    const int x = threadIdx.x % across, y = threadIdx.x / across, down = THREADS / across;
    for (long long j = 0; j < columns; j += across)
        for (long long i = first; i < last; i += down) f(i + y, j + x, i + y < last && j + x < columns);
}

// sums[j] = the sum of f(i, j) over those rows. Every f has been called, and every sum is there for
// all threads of the block, when it returns. Without sums (null) it only calls f.
template <class F>
static DEVICE void column_partials(long long first, long long last, long long columns, int across,
                                   real* sums, F f) {
    __shared__ real s_sums[THREADS];
    const int x = threadIdx.x % across, y = threadIdx.x / across, down = THREADS / across;
    for (long long j0 = 0; j0 < columns; j0 += across) {
        const long long j = j0 + x;
        real sum = real(0);
        if (j < columns)
            for (long long i = first + y; i < last; i += down) sum += f(i, j);
        if (!sums) continue;
        s_sums[threadIdx.x] = sum;
        __syncthreads();
        if (y == 0 && j < columns) {
            for (int k = 1; k < down; ++k) sum += s_sums[k * across + x];
            sums[j] = sum;
        }
        __syncthreads();
    }
}
