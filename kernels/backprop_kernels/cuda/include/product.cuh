// C = A B by tiles, on any GPU: registers hold a tile of C, shared memory strips of A and B.
//
// M, N, K are the product's sizes; what they are of a layer, each .cu says. A(m, k) lies at
// A[m lda + k], or with A_BY_K at A[k lda + m]; B(k, n) at B[n ldb + k], or with B_BY_K at
// B[k ldb + n]. Any size, 0 included; what lies outside A and B counts as 0 and is not read.
// The next strip is fetched into registers while this one is multiplied; two sets of strips take
// turns, so one barrier a strip is enough.
#pragma once
#include "corner.cuh"

// How a block of threads cuts C. Each thread computes ROWS x COLUMNS elements, in groups of 4 x 4,
// so that four neighbours leave shared memory in one load and four columns lie side by side in C.
template <int BLOCK_M, int BLOCK_N, int BLOCK_K, int ROWS, int COLUMNS> struct ThreadTile {
    static constexpr int M = BLOCK_M, N = BLOCK_N, K = BLOCK_K, R = ROWS, C = COLUMNS;
    static constexpr int ACROSS = N / C, DOWN = M / R, THREADS = ACROSS * DOWN;
    static constexpr int PAD = 4;  // keeps rows 16-byte aligned and strip writes free of conflicts

    // Row i and column j of this thread (or of the threads `down` the tile), within the tile.
    static DEVICE int row(int i, int down) { return i / 4 * (M * 4 / R) + down * 4 + i % 4; }
    static DEVICE int row(int i) { return row(i, int(threadIdx.x) / ACROSS); }
    static DEVICE int column(int j) { return j / 4 * (N * 4 / C) + int(threadIdx.x) % ACROSS * 4 + j % 4; }
};

using Tile = ThreadTile<TILE>;

// One thread's part of a strip of A or B: SIZE rows (or columns) by Tile::K, from memory to `s`.
template <int SIZE, bool BY_K> struct Strip {
    static constexpr int EACH = SIZE * Tile::K / Tile::THREADS;
    static_assert(SIZE * Tile::K % Tile::THREADS == 0, "every thread fetches as much");
    real fetched[EACH];

    // Element e of this thread: (index along the tile's side, index along K).
    static DEVICE int along(int e) {
        const int i = int(threadIdx.x) + e * Tile::THREADS;
        return BY_K ? i % SIZE : i / Tile::K;
    }
    static DEVICE int depth(int e) {
        const int i = int(threadIdx.x) + e * Tile::THREADS;
        return BY_K ? i / SIZE : i % Tile::K;
    }
    DEVICE void fetch(const real* from, long long stride, long long first, long long size,
                      long long k, long long k_end) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const long long i = first + along(e), at = k + depth(e);
            fetched[e] = i < size && at < k_end ? from[BY_K ? at * stride + i : i * stride + at] : real(0);
        }
    }
    DEVICE void store(real (&s)[Tile::K][SIZE + Tile::PAD]) const {
#pragma unroll
        for (int e = 0; e < EACH; ++e) s[depth(e)][along(e)] = fetched[e];
    }
};

struct Sums {
    real at[Tile::R][Tile::C];
};

// Let the sums of the tile of C at `corner` begin with f(m, n).
template <class F> static DEVICE void begin(Sums& sums, Corner corner, F f) {
#pragma unroll
    for (int i = 0; i < Tile::R; ++i)
#pragma unroll
        for (int j = 0; j < Tile::C; ++j) sums.at[i][j] = f(corner.m + Tile::row(i), corner.n + Tile::column(j));
}

// Add to this thread's elements of that tile, over k0 <= k < k_end in order.
template <bool A_BY_K, bool B_BY_K>
static DEVICE void multiply(const real* A, long long lda, const real* B, long long ldb, long long M,
                            long long N, Corner corner, long long k0, long long k_end, Sums& sums) {
    __shared__ __align__(16) real s_A[2][Tile::K][Tile::M + Tile::PAD];
    __shared__ __align__(16) real s_B[2][Tile::K][Tile::N + Tile::PAD];
    Strip<Tile::M, A_BY_K> a;
    Strip<Tile::N, B_BY_K> b;
    a.fetch(A, lda, corner.m, M, k0, k_end);
    b.fetch(B, ldb, corner.n, N, k0, k_end);
    a.store(s_A[0]);
    b.store(s_B[0]);
    __syncthreads();
    int now = 0;
    for (long long k = k0; k < k_end; k += Tile::K) {
        const bool more = k + Tile::K < k_end;
        if (more) {
            a.fetch(A, lda, corner.m, M, k + Tile::K, k_end);
            b.fetch(B, ldb, corner.n, N, k + Tile::K, k_end);
        }
#pragma unroll
        for (int p = 0; p < Tile::K; ++p) {
            real r_A[Tile::R], r_B[Tile::C];
#pragma unroll
            for (int i = 0; i < Tile::R; ++i) r_A[i] = s_A[now][p][Tile::row(i)];
#pragma unroll
            for (int j = 0; j < Tile::C; ++j) r_B[j] = s_B[now][p][Tile::column(j)];
#pragma unroll
            for (int i = 0; i < Tile::R; ++i)
#pragma unroll
                for (int j = 0; j < Tile::C; ++j) sums.at[i][j] += r_A[i] * r_B[j];
        }
        if (more) {
            a.store(s_A[now ^ 1]);
            b.store(s_B[now ^ 1]);
        }
        __syncthreads();
        now ^= 1;
    }
}

// Call element(m, n, sum) for every element of the tile that lies in C, neighbouring threads on
// neighbouring columns. A thread sees one column only: `threadIdx.x % Tile::N` of the tile. Whole
// warps call it, so that n may be N or more.
// The sums go by shared memory a few rows at a time, so that `element` is compiled once.
template <class Element>
static DEVICE void for_each(const Sums& sums, long long M, long long N, Corner corner, Element element) {
    __shared__ __align__(16) real s_rows[Tile::DOWN][Tile::N];
    static_assert(Tile::THREADS % Tile::N == 0, "a thread keeps its column");
    const int column = threadIdx.x % Tile::N;
#pragma unroll 1
    for (int i = 0; i < Tile::R; ++i) {
#pragma unroll
        for (int r = 0; r < Tile::R; ++r) {
            if (r != i) continue;  // a register has no run-time index
#pragma unroll
            for (int j = 0; j < Tile::C; ++j) s_rows[threadIdx.x / Tile::ACROSS][Tile::column(j)] = sums.at[r][j];
        }
        __syncthreads();
#pragma unroll 1
        for (int down = threadIdx.x / Tile::N; down < Tile::DOWN; down += Tile::THREADS / Tile::N) {
            const long long m = corner.m + Tile::row(i, down), n = corner.n + column;
            if (m < M) element(m, n, s_rows[down][column]);
        }
        __syncthreads();
    }
}

#include "one_tile.cuh"  // which completes this
