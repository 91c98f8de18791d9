// Sums over the rows of `partial`, in order: the end of every bias gradient and of a split product.
//
// partial (rows, columns), factor () or null, which is 1                     read
// sums (columns), times factor                                               written; 0 where there are no rows
// before () or null: where it is not 0, sums go on from those that are there    read
// One thread per column; 64-bit offsets.
#include "variant.cuh"
#include "ptx.cuh"

extern "C" __global__ void __launch_bounds__(256)
column_sums(const real* partial, const real* factor, const long long* before, real* sums, long long rows,
            long long columns) {
    const long long n = blockIdx.x * 256ll + threadIdx.x;
    if (n >= columns) return;
    real sum = before && *before ? sums[n] : real(0);
    for (long long i = 0; i < rows; ++i) sum += partial[i * columns + n];
    sums[n] = factor ? sum * *factor : sum;
}
