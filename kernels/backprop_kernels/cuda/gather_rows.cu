// gather_rows: Y_r = X_(index_r).  docs/derivations.md#gather_rows
//
// X (rows, words), index (count)    read; words are 4 bytes, whatever they mean
// Y (count, words)                  written
// `across` threads side by side move a row. Indices beyond X take its nearest row.
#include "variant.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gather_rows(const unsigned* X, const long long* index, unsigned* Y, long long rows, long long count,
            long long words, long long across) {
    const int side = int(across);
    const long long r = blockIdx.x * (long long)(THREADS / side) + threadIdx.x / side;
    if (r >= count) return;
    const long long wanted = index[r];
    const long long source = wanted < 0 ? 0 : wanted >= rows ? rows - 1 : wanted;
    for (long long w = threadIdx.x % side; w < words; w += side)
        Y[r * words + w] = X[source * words + w];
}
