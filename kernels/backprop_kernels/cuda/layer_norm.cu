// layer_norm: statistics over the features of each row.  docs/derivations.md#layer_norm
//
// X (rows, columns), gamma, beta (columns); backward: dZ, the layer below's `saved`    read
// Y, dZ_prev (rows, columns), mean, rstd (rows); saved: as in epilogue.cuh, or null    written
// products, partial (blocks, columns): of dgamma and db_prev; partial may be null      written
// Fused: activation and dropout forward; the layer below backward.
// A row belongs to a team of TEAM threads: a warp, or for wide rows a block. Not `centred`, the mean
// is taken as 0.
#include "variant.cuh"
#include "epilogue.cuh"
#include "reduce.cuh"

// The sum over the threads of a row's team.
static DEVICE real team_sum(real x) { return TEAM == WARP ? lane_sum(x) : block_sum(x); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
layer_norm_forward(const stored* X, const real* gamma, const real* beta, result* Y, kept* saved,
                   real* mean, real* rstd, long long rows, long long columns, real eps,
                   long long centred, const long long* stream, const long long* before, long long layer,
                   long long threshold, real scale) {
    const long long i = blockIdx.x * (long long)(THREADS / TEAM) + threadIdx.x / TEAM;
    if (i >= rows) return;  // a whole team
    const int lane = threadIdx.x % TEAM;
    const long long e = i * columns;
    const real width = real(max(columns, 1ll));
    real sum = real(0), square = real(0);
    if (centred)
        for (long long j = lane; j < columns; j += TEAM) sum += X[e + j];
    const real middle = team_sum(sum) / width;
    for (long long j = lane; j < columns; j += TEAM) {
        const real d = X[e + j] - middle;
        square += d * d;
    }
    const real narrow = real(1) / sqrt(team_sum(square) / width + eps);
    KeepMask keep(stream, before, layer, threshold);
    for (long long j = lane; j / WARP * WARP < columns; j += TEAM) {  // whole warps
        const bool inside = j < columns;
        const real z = inside ? (X[e + j] - middle) * narrow * gamma[j] + beta[j] : real(0);
        const real y = forward_epilogue(z, i, j, columns, inside, saved, keep, scale);
        if (inside) Y[e + j] = result(y);
    }
    if (lane == 0) {
        mean[i] = middle;
        rstd[i] = narrow;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
layer_norm_backward(const stored* dZ, const stored* X, const real* gamma, const real* mean,
                    const real* rstd, const kept* saved, stored* dZ_prev, real* products,
                    real* partial, long long rows, long long columns,
                    long long rows_per_block, long long across, long long centred,
                    const long long* stream, const long long* before, long long layer, long long threshold,
                    real scale) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const int lane = threadIdx.x % TEAM;
    const real width = real(columns);
    KeepMask keep(stream, before, layer, threshold);
    for (long long i = first + threadIdx.x / TEAM; i < last; i += THREADS / TEAM) {
        const long long e = i * columns;
        real shift = real(0), slope = real(0);
        for (long long j = lane; j < columns; j += TEAM) {
            const real d = dZ[e + j] * gamma[j];
            shift += d;
            slope += d * ((X[e + j] - mean[i]) * rstd[i]);
        }
        shift = team_sum(shift) / width;
        slope = team_sum(slope) / width;
        if (!centred) shift = real(0);
        for (long long j = lane; j < columns; j += TEAM) {
            const real x_hat = (X[e + j] - mean[i]) * rstd[i];
            const real g = rstd[i] * (dZ[e + j] * gamma[j] - shift - x_hat * slope);
            const Saved of = read_saved(saved, i, j, columns);
            dZ_prev[e + j] = stored(backward_epilogue(g, i, j, columns, of, keep, scale));
        }
    }
    column_partials(first, last, columns, int(across), products + blockIdx.x * columns,
                    [&](long long i, long long j) {
        const long long e = i * columns + j;
        return dZ[e] * ((X[e] - mean[i]) * rstd[i]);
    });
    if (partial)  // all threads have been there for the sums above: dZ_prev is complete
        column_partials(first, last, columns, int(across), partial + blockIdx.x * columns,
                        [&](long long i, long long j) { return real(dZ_prev[i * columns + j]); });
}
