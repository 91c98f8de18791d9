// loss: value and dZ of the elementwise losses, in one pass.  docs/derivations.md#loss
//
// Z, target (rows, columns), shares (rows) or null for one `share` of every row    read
// dZ (rows, columns), partial (blocks, columns), values (blocks)                   written
// Fused: the output activation, weights, column sums. variant.cuh gives `value` and `gradient` by z
// of (z, t, option a, option b); an option is a number, or an array of one per column.
// One block per rows_per_block rows. Values are summed in float64, as their sum is.
#include "variant.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss(const real* Z, const real* target, const real* shares, real share, real* dZ, real* partial,
     double* values, long long rows, long long columns, long long rows_per_block, long long across,
     real a, const real* each_a, real b, const real* each_b) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const real mean = real(1) / real(columns);
    double sum = 0;
    column_partials(first, last, columns, int(across), partial + blockIdx.x * columns,
                    [&](long long i, long long j) {
        const long long e = i * columns + j;
        const real w = shares ? shares[i] : share;
        real g = real(0);
        if (w != 0) {  // a weight of 0 removes its row, even one whose loss is infinite
            const real p = each_a ? each_a[j] : a, q = each_b ? each_b[j] : b;
            sum += double(value(Z[e], target[e], p, q)) * double(w);
            g = gradient(Z[e], target[e], p, q) * mean * w;
        }
        dZ[e] = g;
        return g;
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) values[blockIdx.x] = sum / double(columns);
}
