// Which tile of C a block computes, and how K is cut.
#pragma once
#include "ptx.cuh"

struct Corner {
    long long m, n;  // of the tile's first element
};

// Tiles go down a group of GROUP rows of tiles before they go across: blocks that run at the same
// time then read the same strips of A and B, which stay in the L2 cache.
// 32 bits count tiles, as 64 would be divided by a function call.
template <class T> DEVICE Corner corner(u32 block, long long M, long long N) {
    constexpr u32 GROUP = 8;
    const u32 across = u32((N + T::N - 1) / T::N), down = u32((M + T::M - 1) / T::M);
    const u32 first = block / (GROUP * across) * GROUP, height = min(GROUP, down - first);
    const u32 i = block - first * across;
    return {(first + i % height) * (long long)T::M, i / height * (long long)T::N};
}

// K in runs of `length`. Blocks that take turns at a tile keep its sums in `unfinished`. Where rows came
// `before` those along this K, sums go on from those in `earlier` (M, N): CHAINED, they begin with them;
// ADDED, the first run's are added to them.
enum Start { FRESH, CHAINED, ADDED };
template <Start FROM> struct Cut {
    static constexpr Start START = FROM;
    long long length;
    real* unfinished;
    u32* turns;
    const real* earlier = nullptr;
    const long long* before = nullptr;

    DEVICE bool goes_on() const { return *before != 0; }
};
struct Uncut {
    static constexpr Start START = FRESH;
};

struct NoSums {};  // of columns, in the place of a function of them
template <class A, class B> constexpr bool same_type = false;
template <class A> constexpr bool same_type<A, A> = true;
