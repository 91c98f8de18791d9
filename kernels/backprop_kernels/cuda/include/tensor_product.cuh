// C = A B by tiles, on tensor cores (sm_80 and later): each warp multiplies pieces of 16 x 16.
//
// The interface is that of product.cuh: the same sizes, the same meaning of A_BY_K and B_BY_K, any
// size. A and B are arrays of `stored`; C is summed in float32.
// STAGES strips of A and B lie in shared memory. While one is multiplied, the next STAGES - 1 are on
// their way past the registers (cp.async), and one barrier a strip is enough. Rows that do not start
// on 16 bytes cannot go that way; they are copied element by element.
#pragma once
#include "corner.cuh"
#include "floats.cuh"

// How a block cuts C: each warp computes WARP_M x WARP_N elements.
template <int BLOCK_M, int BLOCK_N, int WARP_M, int WARP_N, int COUNT> struct WarpTile {
    static constexpr int M = BLOCK_M, N = BLOCK_N, STAGES = COUNT;
    static constexpr int ACROSS = N / WARP_N, DOWN = M / WARP_M, THREADS = 32 * ACROSS * DOWN;
    static constexpr int ROWS = WARP_M / 16, COLUMNS = WARP_N / 16;  // pieces of 16 x 16 a warp

    static DEVICE int warp_row() { return int(threadIdx.x) / 32 / ACROSS * WARP_M; }
    static DEVICE int warp_column() { return int(threadIdx.x) / 32 % ACROSS * WARP_N; }
};
using Tile = WarpTile<TILE>;

constexpr int CHUNK = 16 / sizeof(stored);    // elements that are copied at once
constexpr int STRIP_K = 64 / sizeof(stored);  // length of a strip
constexpr int STEPS = 2 / operand::FRAGMENTS;  // of 32 or 64 bytes of K, which one mma multiplies

// A strip of A or B in shared memory: SIZE rows of K, or with BY_K as many rows of SIZE as K has
// elements; in chunks of 16 bytes. A chunk's place in its row is crossed with the row's number, so
// that neither the copies nor the reads of a fragment meet two rows in one bank.
template <int SIZE, bool BY_K> struct Strip {
    static constexpr int ROWS = BY_K ? STRIP_K : SIZE, CHUNKS = (BY_K ? SIZE : STRIP_K) / CHUNK;
    static constexpr int BYTES = SIZE * 64;

    // Where chunk `c` of row `r` lies, in bytes.
    static DEVICE int place(int r, int c) {
        constexpr int IN_A_LINE = CHUNKS < 8 ? CHUNKS : 8;  // of the 128 bytes that all banks hold
        const bool by_element = BY_K && sizeof(stored) == 4;  // each read meets 4 rows, 2 chunks each
        const int turn = by_element ? r % 4 * 2 : r / (8 / IN_A_LINE) % IN_A_LINE;
        return (r * CHUNKS + (c ^ turn)) * 16;
    }

    // This thread's chunks of the strip whose first element is (first, k); outside of size x k_end
    // everything is 0. They lie in one column of chunks, EVERY rows apart.
    static DEVICE void fetch(unsigned char* to, const stored* from, long long stride, long long first,
                             long long size, long long k, long long k_end) {
        constexpr int EVERY = Tile::THREADS / CHUNKS;
        static_assert(Tile::THREADS % CHUNKS == 0 && ROWS % EVERY == 0, "every thread fetches as much");
        const int c = threadIdx.x % CHUNKS, down = threadIdx.x / CHUNKS;
        const long long column = (BY_K ? first : k) + c * CHUNK, row = (BY_K ? k : first) + down;
        const long long right = (BY_K ? size : k_end) - column, below = (BY_K ? k_end : size) - row;
        const int wide = right < CHUNK ? int(max(right, 0ll)) : CHUNK;  // elements of a chunk that are there
        const stored* source = from + row * stride + column;
        const bool whole = (reinterpret_cast<size_t>(from) | size_t(stride) * sizeof(stored)) % 16 == 0;
        if (whole) {
#pragma unroll
            for (int e = 0; e < ROWS / EVERY; ++e)
                copy_async_16(shared_address(to + place(down + e * EVERY, c)), source + e * EVERY * stride,
                              e * EVERY < below ? wide * sizeof(stored) : 0);
            return;
        }
#pragma unroll 1
        for (int e = 0; e < ROWS / EVERY; ++e) {
            stored* chunk = reinterpret_cast<stored*>(to + place(down + e * EVERY, c));
            for (int j = 0; j < CHUNK; ++j)
                chunk[j] = e * EVERY < below && j < wide ? source[e * EVERY * stride + j] : stored(0.0f);
        }
    }

    // The 16 rows (or columns of C) at `first` by 32 bytes of K, as four matrices of 8 rows by 16 bytes.
    // mma takes of A first both halves of the rows, of B first both halves of K: registers that it
    // takes together lie side by side.
    template <bool OF_B> static DEVICE void fragment(u32 (&r)[4], const unsigned char* strip, int first, int part) {
        const auto lower = [](int matrix) { return OF_B ? matrix / 2 : matrix % 2; };  // half of the rows
        const auto later = [](int matrix) { return OF_B ? matrix % 2 : matrix / 2; };  // half of K
        const int lane = threadIdx.x % 32, matrix = lane / 8;
        if constexpr (!BY_K) {
            const int row = first + lower(matrix) * 8 + lane % 8;
            ldmatrix_x4(r, shared_address(strip + place(row, part * 2 + later(matrix))));
        } else if constexpr (sizeof(stored) == 2) {
            const int k = part * 16 + later(matrix) * 8 + lane % 8;
            ldmatrix_x4_transposed(r, shared_address(strip + place(k, first / 8 + lower(matrix))));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int k = part * 8 + later(i) * 4 + lane % 4, m = first + lower(i) * 8 + lane / 4;
                r[i] = *reinterpret_cast<const u32*>(strip + place(k, m / 4) + m % 4 * 4);
            }
        }
    }

    // The same rows by what one mma multiplies, ready for it.
    template <bool OF_B>
    static DEVICE void factors(u32 (&planes)[operand::PLANES][4], const unsigned char* strip, int first, int step) {
        u32 parts[operand::FRAGMENTS][4];
#pragma unroll
        for (int p = 0; p < operand::FRAGMENTS; ++p)
            fragment<OF_B>(parts[p], strip, first, step * operand::FRAGMENTS + p);
        operand::template ready<OF_B>(planes, parts);
    }
};

struct Sums {
    float at[Tile::ROWS][Tile::COLUMNS * 2][4];  // pieces of 16 x 8, as mma gives them
};

// What one step adds to this warp's pieces in column `j`. With planes, the product of plane p of A and
// plane q of B is left out where p + q >= PLANES: so small is what the planes themselves leave over.
// Tensor cores cut digits off their sums; so these are short, begin with the smallest products, and
// join the long sum by ordinary addition, which rounds.
static DEVICE void add_products(Sums& sums, int j, const u32 (&a)[Tile::ROWS][operand::PLANES][4],
                                const u32 (&b)[operand::PLANES][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float parts[Tile::ROWS][4] = {};
#pragma unroll
        for (int order = operand::PLANES - 1; order >= 0; --order)
#pragma unroll
            for (int p = 0; p <= order; ++p)
#pragma unroll
                for (int i = 0; i < Tile::ROWS; ++i) {
                    const u32 side[2] = {b[order - p][2 * half], b[order - p][2 * half + 1]};
                    float(&sum)[4] = operand::PLANES > 1 ? parts[i] : sums.at[i][2 * j + half];
                    operand::multiply_add(sum, a[i][p], side);
                }
        if (operand::PLANES > 1)
#pragma unroll
            for (int i = 0; i < Tile::ROWS; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) sums.at[i][2 * j + half][e] += parts[i][e];
    }
}

// Let the sums of the tile of C at `corner` begin with f(m, n).
template <class F> static DEVICE void begin(Sums& sums, Corner corner, F f) {
    const long long m = corner.m + Tile::warp_row() + threadIdx.x % 32 / 4;
    const long long n = corner.n + Tile::warp_column() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < Tile::ROWS; ++i)
#pragma unroll
        for (int j = 0; j < Tile::COLUMNS * 2; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums.at[i][j][e] = f(m + i * 16 + e / 2 * 8, n + j * 8 + e % 2);
}

// Add to this warp's elements of that tile, over k0 <= k < k_end.
template <bool A_BY_K, bool B_BY_K>
static DEVICE void multiply(const stored* A, long long lda, const stored* B, long long ldb, long long M,
                            long long N, Corner corner, long long k0, long long k_end, Sums& sums) {
    using OfA = Strip<Tile::M, A_BY_K>;
    using OfB = Strip<Tile::N, B_BY_K>;
    DYNAMIC_SHARED(strips);  // STAGES of A and B each
    const auto fetch = [&](int stage, long long k) {
        if (k < k_end) {
            unsigned char* to = strips + stage * (OfA::BYTES + OfB::BYTES);
            OfA::fetch(to, A, lda, corner.m, M, k, k_end);
            OfB::fetch(to + OfA::BYTES, B, ldb, corner.n, N, k, k_end);
        }
        copy_async_commit();  // also where there is nothing: the groups are counted
    };
    for (int stage = 0; stage < Tile::STAGES - 1; ++stage) fetch(stage, k0 + stage * STRIP_K);
    int now = 0, next = Tile::STAGES - 1;
#pragma unroll 1
    for (long long k = k0; k < k_end; k += STRIP_K) {
        copy_async_wait<Tile::STAGES - 2>();
        __syncthreads();  // this strip is there for all, and all have done with the one before
        fetch(next, k + (Tile::STAGES - 1) * STRIP_K);
        const unsigned char* of_A = strips + now * (OfA::BYTES + OfB::BYTES);
        const unsigned char* of_B = of_A + OfA::BYTES;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            u32 a[Tile::ROWS][operand::PLANES][4];
#pragma unroll
            for (int i = 0; i < Tile::ROWS; ++i)
                OfA::template factors<false>(a[i], of_A, Tile::warp_row() + i * 16, step);
#pragma unroll
            for (int j = 0; j < Tile::COLUMNS; ++j) {
                u32 b[operand::PLANES][4];
                OfB::template factors<true>(b, of_B, Tile::warp_column() + j * 16, step);
                add_products(sums, j, a, b);
            }
        }
        now = now + 1 == Tile::STAGES ? 0 : now + 1;
        next = next + 1 == Tile::STAGES ? 0 : next + 1;
    }
}

// As in product.cuh: element(m, n, sum) for every element of the tile that lies in C, by whole warps
// whose threads keep their column. Sums go by shared memory, 16 rows of each warp at a time.
template <class Element>
static DEVICE void for_each(const Sums& sums, long long M, long long N, Corner corner, Element element) {
    constexpr int STRIDE = Tile::N + 8;  // 8: four rows of a fragment lie in different banks
    static_assert(Tile::DOWN * 16 * STRIDE * 4 <= Tile::STAGES * 64 * (Tile::M + Tile::N), "fits the strips");
    static_assert(Tile::THREADS % Tile::N == 0, "a thread keeps its column");
    DYNAMIC_SHARED(strips);
    float* s_rows = reinterpret_cast<float*>(strips);
    const int column = threadIdx.x % Tile::N, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < Tile::ROWS; ++i) {
        __syncthreads();  // the strips, or the rows before, have been read
#pragma unroll
        for (int r = 0; r < Tile::ROWS; ++r) {
            if (r != i) continue;  // a register has no run-time index
#pragma unroll
            for (int j = 0; j < Tile::COLUMNS * 2; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int row = Tile::warp_row() / Tile::ROWS + lane / 4 + e / 2 * 8;
                    s_rows[row * STRIDE + Tile::warp_column() + j * 8 + lane % 4 * 2 + e % 2] = sums.at[r][j][e];
                }
        }
        __syncthreads();
#pragma unroll 1
        for (int row = threadIdx.x / Tile::N; row < Tile::DOWN * 16; row += Tile::THREADS / Tile::N) {
            const long long m = corner.m + (row / 16 * Tile::ROWS + i) * 16 + row % 16, n = corner.n + column;
            if (m < M) element(m, n, s_rows[row * STRIDE + column]);
        }
    }
}

#include "one_tile.cuh"  // which completes this
