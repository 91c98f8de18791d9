// loss: value and dZ of the elementwise losses, in one pass.  docs/derivations.md#loss
//
// Z, target (rows, columns), shares (rows) or null for one `share` of every row    read
// dZ (rows, columns), partial (blocks, columns), values (blocks)                   written
// Fused: the output activation, weights, column sums. An option is a number, or an array of one per
// column. One block per rows_per_block rows. Values are summed in float64, as their sum is.
#include "variant.cuh"
#include "elementwise_loss.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss(const real* Z, const real* target, const real* shares, real share, real* dZ, real* partial,
     double* values, long long rows, long long columns, long long rows_per_block, long long across,
     real a, const real* each_a, real b, const real* each_b) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const Aim aim{target, nullptr, a, b, each_a, each_b};
    const real mean = real(1) / real(columns);
    double sum = 0;
    column_partials(first, last, columns, int(across), partial + blockIdx.x * columns,
                    [&](long long i, long long j) {
        const long long e = i * columns + j;
        const real w = shares ? shares[i] : share;
        return dZ[e] = loss_element(Z[e], aim, i, j, columns, w, mean, sum);
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) values[blockIdx.x] = sum / double(columns);
}
