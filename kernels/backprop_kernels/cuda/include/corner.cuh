// Which tile of C a block computes.
#pragma once
#include "ptx.cuh"

struct Corner {
    long long m, n;  // of the tile's first element
};

// Tiles go down a group of GROUP rows of tiles before they go across: blocks that run at the same
// time then read the same strips of A and B, which stay in the L2 cache.
template <class T> DEVICE Corner corner(long long block, long long M, long long N) {
    constexpr long long GROUP = 8;
    const long long across = (N + T::N - 1) / T::N, down = (M + T::M - 1) / T::M;
    const long long first = block / (GROUP * across) * GROUP, height = min(GROUP, down - first);
    const long long i = block - first * across;
    return {(first + i % height) * T::M, i / height * T::N};
}
