// C = A B by tiles, on any GPU: registers hold a tile of C, shared memory strips of A and B.
//
// M, N, K are the product's sizes; what they are of a layer, each .cu says. A(m, k) lies at
// A[m lda + k], or with A_BY_K at A[k lda + m]; B(k, n) at B[n ldb + k], or with B_BY_K at
// B[k ldb + n]. Any size, 0 included; what lies outside A and B counts as 0 and is not read.
// The next strip is fetched into registers while this one is multiplied; two sets of strips take
// turns, so one barrier a strip is enough.
#pragma once
#include "ptx.cuh"

// How a block of threads cuts C. Each thread computes ROWS x COLUMNS elements, in groups of 4 x 4,
// so that four neighbours leave shared memory in one load and four columns lie side by side in C.
template <int BLOCK_M, int BLOCK_N, int BLOCK_K, int ROWS, int COLUMNS> struct Tile {
    static constexpr int M = BLOCK_M, N = BLOCK_N, K = BLOCK_K, R = ROWS, C = COLUMNS;
    static constexpr int ACROSS = N / C, DOWN = M / R, THREADS = ACROSS * DOWN;
    static constexpr int PAD = 4;  // keeps rows 16-byte aligned and strip writes free of conflicts

    // Row i and column j of this thread (or of the threads `down` the tile), within the tile.
    static DEVICE int row(int i, int down) { return i / 4 * (M * 4 / R) + down * 4 + i % 4; }
    static DEVICE int row(int i) { return row(i, int(threadIdx.x) / ACROSS); }
    static DEVICE int column(int j) { return j / 4 * (N * 4 / C) + int(threadIdx.x) % ACROSS * 4 + j % 4; }
};

template <int BYTES> struct LargeOf { using type = Tile<128, 128, 8, 8, 8>; };
template <> struct LargeOf<8> { using type = Tile<64, 64, 8, 4, 4>; };
using Large = LargeOf<sizeof(real)>::type;
using Small = Tile<32, 32, 16, 4, 4>;

// One thread's part of a strip of A or B: SIZE rows (or columns) by T::K, from memory to `s`.
template <class T, int SIZE, bool BY_K> struct Strip {
    static constexpr int EACH = SIZE * T::K / T::THREADS;
    static_assert(SIZE * T::K % T::THREADS == 0, "every thread fetches as much");
    real fetched[EACH];

    // Element e of this thread: (index along the tile's side, index along K).
    static DEVICE int along(int e) {
        const int i = int(threadIdx.x) + e * T::THREADS;
        return BY_K ? i % SIZE : i / T::K;
    }
    static DEVICE int depth(int e) {
        const int i = int(threadIdx.x) + e * T::THREADS;
        return BY_K ? i / SIZE : i % T::K;
    }
    DEVICE void fetch(const real* from, long long stride, long long first, long long size,
                      long long k, long long k_end) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const long long i = first + along(e), at = k + depth(e);
            fetched[e] = i < size && at < k_end ? from[BY_K ? at * stride + i : i * stride + at] : real(0);
        }
    }
    DEVICE void store(real (&s)[T::K][SIZE + T::PAD]) const {
#pragma unroll
        for (int e = 0; e < EACH; ++e) s[depth(e)][along(e)] = fetched[e];
    }
};

template <class T> struct Accumulators {
    real at[T::R][T::C];
};

// This thread's elements of the tile of C at (m0, n0), summed over k0 <= k < k_end in order.
template <class T, bool A_BY_K, bool B_BY_K>
static DEVICE void multiply(const real* A, long long lda, const real* B, long long ldb, long long M,
                     long long N, long long m0, long long n0, long long k0, long long k_end,
                     Accumulators<T>& sums) {
    __shared__ __align__(16) real s_A[2][T::K][T::M + T::PAD];
    __shared__ __align__(16) real s_B[2][T::K][T::N + T::PAD];
#pragma unroll
    for (int i = 0; i < T::R; ++i)
#pragma unroll
        for (int j = 0; j < T::C; ++j) sums.at[i][j] = real(0);
    Strip<T, T::M, A_BY_K> a;
    Strip<T, T::N, B_BY_K> b;
    a.fetch(A, lda, m0, M, k0, k_end);
    b.fetch(B, ldb, n0, N, k0, k_end);
    a.store(s_A[0]);
    b.store(s_B[0]);
    __syncthreads();
    int now = 0;
    for (long long k = k0; k < k_end; k += T::K) {
        const bool more = k + T::K < k_end;
        if (more) {
            a.fetch(A, lda, m0, M, k + T::K, k_end);
            b.fetch(B, ldb, n0, N, k + T::K, k_end);
        }
#pragma unroll
        for (int p = 0; p < T::K; ++p) {
            real r_A[T::R], r_B[T::C];
#pragma unroll
            for (int i = 0; i < T::R; ++i) r_A[i] = s_A[now][p][T::row(i)];
#pragma unroll
            for (int j = 0; j < T::C; ++j) r_B[j] = s_B[now][p][T::column(j)];
#pragma unroll
            for (int i = 0; i < T::R; ++i)
#pragma unroll
                for (int j = 0; j < T::C; ++j) sums.at[i][j] += r_A[i] * r_B[j];
        }
        if (more) {
            a.store(s_A[now ^ 1]);
            b.store(s_B[now ^ 1]);
        }
        __syncthreads();
        now ^= 1;
    }
}

// Call element(m, n, sum) for every element of the tile at (m0, n0) that lies in C, neighbouring
// threads on neighbouring columns. A thread sees one column only: `threadIdx.x % T::N` of the tile.
// The sums go by shared memory a few rows at a time, so that `element` is compiled once.
template <class T, class Element>
static DEVICE void for_each(const Accumulators<T>& sums, long long M, long long N, long long m0,
                            long long n0, Element element) {
    __shared__ __align__(16) real s_rows[T::DOWN][T::N];
    static_assert(T::THREADS % T::N == 0, "a thread keeps its column");
    const int column = threadIdx.x % T::N;
#pragma unroll 1
    for (int i = 0; i < T::R; ++i) {
#pragma unroll
        for (int r = 0; r < T::R; ++r) {
            if (r != i) continue;  // a register has no run-time index
#pragma unroll
            for (int j = 0; j < T::C; ++j) s_rows[threadIdx.x / T::ACROSS][T::column(j)] = sums.at[r][j];
        }
        __syncthreads();
#pragma unroll 1
        for (int down = threadIdx.x / T::N; down < T::DOWN; down += T::THREADS / T::N) {
            const long long m = m0 + T::row(i, down), n = n0 + column;
            if (m < M && n < N) element(m, n, s_rows[down][column]);
        }
        __syncthreads();
    }
}
