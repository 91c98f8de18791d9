// batch_norm: statistics over the batch.  docs/derivations.md#batch_norm
//
// X (rows, columns), gamma, beta (columns); backward: dZ, the layer below's `saved`    read
// Y, dZ_prev (rows, columns), mean, rstd (columns), partial (blocks, columns)          written
// saved: as epilogue.cuh has it, or null                                               written
// running_mean, running_var (columns)                                          read and written
// Fused: activation and dropout forward; the layer below backward.
// Sums over the batch go by blocks of rows_per_block rows, then over the blocks in order. A variance
// is taken around the mean of each block, and the blocks' means around the mean of all, so that
// nothing cancels.
#include "variant.cuh"
#include "epilogue.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
batch_norm_blocks(const stored* X, real* sums, real* squares, long long rows, long long columns,
                  long long rows_per_block, long long across) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const real count = real(last - first);
    real* sum = sums + blockIdx.x * columns;
    column_partials(first, last, columns, int(across), sum,
                    [&](long long i, long long j) { return real(X[i * columns + j]); });
    column_partials(first, last, columns, int(across), squares + blockIdx.x * columns,
                    [&](long long i, long long j) {
        const real d = X[i * columns + j] - sum[j] / count;
        return d * d;
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
batch_norm_statistics(const real* sums, const real* squares, long long blocks, real* mean,
                      real* rstd, real* running_mean, real* running_var, real momentum, real eps,
                      long long rows, long long columns, long long rows_per_block) {
    const long long j = blockIdx.x * (long long)THREADS + threadIdx.x;
    if (j >= columns) return;
    real sum = real(0), square = real(0);
    for (long long b = 0; b < blocks; ++b) sum += sums[b * columns + j];
    const real middle = sum / real(rows);
    for (long long b = 0; b < blocks; ++b) {
        const real count = real(min(rows_per_block, rows - b * rows_per_block));
        const real d = sums[b * columns + j] / count - middle;
        square += squares[b * columns + j] + count * d * d;
    }
    mean[j] = middle;
    rstd[j] = real(1) / sqrt(square / real(rows) + eps);
    const real unbiased = square / real(max(rows - 1, 1ll));
    running_mean[j] += momentum * (middle - running_mean[j]);
    running_var[j] += momentum * (unbiased - running_var[j]);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
batch_norm_running(const real* running_mean, const real* running_var, real* mean, real* rstd,
                   real eps, long long columns) {
    const long long j = blockIdx.x * (long long)THREADS + threadIdx.x;
    if (j >= columns) return;
    mean[j] = running_mean[j];
    rstd[j] = real(1) / sqrt(running_var[j] + eps);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
batch_norm_forward(const stored* X, const real* gamma, const real* beta, const real* mean,
                   const real* rstd, result* Y, kept* saved, long long rows, long long columns,
                   long long rows_per_block, long long across, const long long* stream, const long long* before,
                   long long layer, long long threshold, real scale) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    KeepMask keep(stream, before, layer, threshold);
    each(first, last, columns, int(across), [&](long long i, long long j, bool inside) {
        const long long e = i * columns + j;
        const real z = inside ? (X[e] - mean[j]) * rstd[j] * gamma[j] + beta[j] : real(0);
        const real y = forward_epilogue(z, i, j, columns, inside, saved, keep, scale);
        if (inside) Y[e] = result(y);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
batch_norm_products(const stored* dZ, const stored* X, const real* mean, const real* rstd, real* sums,
                    real* products, long long rows, long long columns, long long rows_per_block,
                    long long across) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    column_partials(first, last, columns, int(across), sums + blockIdx.x * columns,
                    [&](long long i, long long j) { return real(dZ[i * columns + j]); });
    column_partials(first, last, columns, int(across), products + blockIdx.x * columns,
                    [&](long long i, long long j) {
        const long long e = i * columns + j;
        return dZ[e] * ((X[e] - mean[j]) * rstd[j]);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
batch_norm_backward(const stored* dZ, const stored* X, const real* gamma, const real* mean,
                    const real* rstd, const real* dbeta, const real* dgamma, const kept* saved,
                    stored* dZ_prev, real* partial, long long rows, long long columns,
                    long long rows_per_block, long long across, const long long* stream, const long long* before,
                    long long layer, long long threshold, real scale) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const real share = real(1) / real(rows);
    KeepMask keep(stream, before, layer, threshold);
    column_partials(first, last, columns, int(across),
                    partial ? partial + blockIdx.x * columns : nullptr,
                    [&](long long i, long long j) {
        const long long e = i * columns + j;
        const real x_hat = (X[e] - mean[j]) * rstd[j];
        const real d = dZ[e] - dbeta[j] * share - x_hat * (dgamma[j] * share);
        const Saved of = read_saved(saved, i, j, columns);
        const real g = backward_epilogue(gamma[j] * rstd[j] * d, i, j, columns, of, keep, scale);
        dZ_prev[e] = stored(g);
        return g;
    });
}
