// C = A B that has been made already, by a library: what follows a product reads its sums.
//
// The interface is that of product.cuh; in the place of A stands C, an array of `real`.
#pragma once
#include "corner.cuh"

template <int BLOCK_M, int BLOCK_N, int COUNT> struct GivenTile {
    static constexpr int M = BLOCK_M, N = BLOCK_N, THREADS = COUNT;
};
using Tile = GivenTile<TILE>;

struct Sums {
    const real* at;  // the whole of C
};

template <class F> static DEVICE void begin(Sums&, Corner, F) {}

template <bool A_BY_K, bool B_BY_K>
static DEVICE void multiply(const stored* A, long long, const stored*, long long, long long, long long, Corner,
                            long long, long long, Sums& sums) {
    sums.at = reinterpret_cast<const real*>(A);
}

template <class Element>
static DEVICE void for_each(const Sums& sums, long long M, long long N, Corner corner, Element element) {
    static_assert(Tile::THREADS % Tile::N == 0, "a thread keeps its column");
    const long long n = corner.n + threadIdx.x % Tile::N, end = min(corner.m + Tile::M, M);
    for (long long m = corner.m + threadIdx.x / Tile::N; m < end; m += Tile::THREADS / Tile::N)
        element(m, n, n < N ? sums.at[m * N + n] : real(0));
}

#include "one_tile.cuh"  // which completes this
