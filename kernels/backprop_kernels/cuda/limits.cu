// limits: what is longer than it may be, scaled down on the device, for a captured step.
//
// G (size): a tensor of the gradient     squares (blocks)                            read and written
// W (rows, columns): weights into one neuron each                                    read and written
// norm (), guard (): of the optimizer; where either is not finite W stays as it is   read
// Lengths are float64 sums of squares. tensor_squares and tensor_limit: as in optimizer_step.cu, every
// block every so-many-th element, and all add up the blocks' sums in order. row_limit: a block a row.
#include "variant.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
tensor_squares(const real* G, double* squares, long long size) {
    const double sum = square_sum(G, size);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
tensor_limit(real* G, const double* squares, long long count, double limit, long long size) {
    const double length = sqrt(array_sum(squares, count));
    if (!isfinite(length) || length <= limit) return;  // NaN stays: the optimizer refuses it
    const real factor = real(limit / length);
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < size;
         i += gridDim.x * (long long)THREADS)
        G[i] *= factor;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
row_limit(real* W, double limit, const double* norm, const double* guard, long long columns) {
    if (!isfinite(norm[0]) || !isfinite(guard[0])) return;
    real* row = W + blockIdx.x * columns;
    double sum = 0;
    for (long long j = threadIdx.x; j < columns; j += THREADS) sum += double(row[j]) * double(row[j]);
    const double length = sqrt(block_sum(sum));
    if (length <= limit) return;
    const real factor = real(limit / length);
    for (long long j = threadIdx.x; j < columns; j += THREADS) row[j] *= factor;
}
