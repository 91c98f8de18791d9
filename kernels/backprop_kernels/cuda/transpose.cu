// transpose: out = valuesᵀ, rounded to tf32, for a product that reads along K alone.
//
// values (rows, columns)                                    read
// out (columns, rows), its rows `pitch` elements apart      written
// A block turns a tile of a warp by a warp; 64-bit offsets.
#include "variant.cuh"
#include "ptx.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
transpose(const real* values, real* out, long long rows, long long columns, long long pitch) {
    __shared__ real s_tile[WARP][WARP + 1];  // rows and columns start in different banks
    const long long across = (columns + WARP - 1) / WARP;
    const long long row = blockIdx.x / across * WARP, column = blockIdx.x % across * WARP;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int i = warp; i < WARP; i += THREADS / WARP)
        if (row + i < rows && column + lane < columns)
            s_tile[i][lane] = values[(row + i) * columns + column + lane];
    __syncthreads();
    for (int i = warp; i < WARP; i += THREADS / WARP)
        if (column + i < columns && row + lane < rows)
            out[(column + i) * pitch + row + lane] = as_float(to_tf32(as_bits(s_tile[lane][i])));
}
