// loss: the Gaussian likelihood of mu and s = log variance, two outputs per target.
// docs/derivations.md#loss
//
// Z (rows, columns): mu, then s; target (rows, columns/2)                   read
// shares (rows) or null for one `share` of every row                        read
// dZ (rows, columns), partial (blocks, columns), values (blocks)            written
// Fused: the output activation, weights, column sums. One block per rows_per_block rows; mu and s
// of a target are finished by different threads, which both compute exp(-s).
#include "variant.cuh"
#include "reduce.cuh"

DEVICE real slope(real z, real y) { return derivative(SAVES == 1 ? y : z); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss_gaussian_nll(const real* Z, const real* target, const real* shares, real share, real* dZ,
                  real* partial, double* values, long long rows, long long columns,
                  long long rows_per_block, long long across) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const long long half = columns / 2;
    const real mean = real(1) / real(half);
    double sum = 0;
    column_partials(first, last, columns, int(across), partial + blockIdx.x * columns,
                    [&](long long i, long long j) {
        const long long k = j < half ? j : j - half, e = i * columns + k;
        const real w = shares ? shares[i] : share;
        real g = real(0);
        if (w != 0) {
            const real z_mu = Z[e], z_s = Z[e + half];
            const real mu = activation(z_mu), s = activation(z_s);
            const real d = mu - target[i * half + k], precision = exp(-s);
            const real square = d * d * precision;
            if (j < half) {
                sum += real(0.5) * (s + square) * double(w);
                g = d * precision * slope(z_mu, mu);
            } else {
                g = real(0.5) * (real(1) - square) * slope(z_s, s);
            }
            g *= mean * w;
        }
        dZ[i * columns + j] = g;
        return g;
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) values[blockIdx.x] = sum / double(half);
}
