// loss: softmax cross-entropy of class ids or of class probabilities.  docs/derivations.md#loss
//
// Z (rows, columns); labels (rows) or probabilities (rows, columns), the other null    read
// shares (rows) or null for one `share` of every row                                    read
// class_weight (columns) or null                                                        read
// dZ (rows, columns), partial (blocks, columns), values (blocks)                        written
// Fused: the output activation, softmax, smoothing, weights, column sums. One block per
// rows_per_block rows; `across` lanes of a warp share a row, and dZ holds its exponentials meanwhile.
#include "variant.cuh"
#include "reduce.cuh"

DEVICE real slope(real z, real y) { return derivative(SAVES == 1 ? y : z); }

// The larger; a NaN need not win, as its exponential is NaN in any case.
DEVICE real larger(real a, real b) { return b > a ? b : a; }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss_cross_entropy(const real* Z, const label_t* labels, const real* probabilities,
                   const real* shares, real share, real* dZ, real* partial, double* values,
                   long long rows, long long columns, long long rows_per_block, long long across,
                   real smoothing, const real* class_weight) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const int lanes = int(across), lane = threadIdx.x % lanes;
    const real uniform = smoothing / real(columns);
    double sum = 0;
    for (long long i0 = first; i0 < last; i0 += THREADS / lanes) {
        const long long row = i0 + threadIdx.x / lanes;
        const bool here = row < last;  // all lanes take part in the sums below
        const long long i = here ? row : first;
        const real* z = Z + i * columns;
        real* d = dZ + i * columns;
        const real w = shares ? shares[i] : share;
        const bool counts = here && w != 0 && w == w;
        const long long label = labels && counts ? (long long)(labels[i]) : 0;

        real top = activation(z[0]);
        for (long long j = lane; j < columns; j += lanes) top = larger(top, activation(z[j]));
        for (int bits = lanes / 2; bits; bits /= 2)
            top = larger(top, __shfl_xor_sync(0xffffffffu, top, bits));
        real below = real(0), weight = real(0);
        const auto q = [&](long long j) {  // the weight of class j in this row
            const real p = labels ? real(j == label) : probabilities[i * columns + j];
            const real smooth = (real(1) - smoothing) * p + uniform;
            return class_weight ? smooth * class_weight[j] : smooth;
        };
        for (long long j = lane; j < columns; j += lanes) {
            const real e = exp(activation(z[j]) - top);
            if (counts) d[j] = e;
            below += e;
            weight += q(j);
        }
        below = lane_sum(below, lanes);
        weight = lane_sum(weight, lanes);
        const real log_sum = log(below), inverse = real(1) / below;
        real value = real(0);
        for (long long j = lane; j < columns; j += lanes) {
            if (!here) break;
            if (!counts) {
                d[j] = w;  // 0, or NaN for a label that is no class
                value = w;
                continue;
            }
            const real y = activation(z[j]), q_j = q(j);
            // 0 (-inf) counts as 0: a class that carries no probability costs nothing.
            if (q_j != 0) value -= q_j * (y - top - log_sum);
            d[j] = (d[j] * inverse * weight - q_j) * w * slope(z[j], y);
        }
        sum += double(value) * double(counts ? w : real(1));
    }
    // The same threads as above take the same elements of dZ: each reads what it wrote.
    column_partials(first, last, columns, lanes, partial + blockIdx.x * columns,
                    [&](long long i, long long j) { return dZ[i * columns + j]; });
    sum = block_sum(sum);
    if (threadIdx.x == 0) values[blockIdx.x] = sum;
}
