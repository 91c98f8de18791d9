// loss: softmax cross-entropy of class ids or of class probabilities.  docs/derivations.md#loss
//
// Z (rows, columns); labels (rows) or probabilities (rows, columns), the other null    read
// shares (rows) or null for one `share` of every row                                    read
// class_weight (columns) or null                                                        read
// dZ (rows, columns), partial (blocks, columns), values (blocks)                        written
// Fused: the output activation, softmax, smoothing, weights, column sums. One block per
// rows_per_block rows; `across` lanes of a warp share a row.
#include "variant.cuh"
#include "cross_entropy.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss_cross_entropy(const real* Z, const label_t* labels, const real* probabilities,
                   const real* shares, real share, real* dZ, real* partial, double* values,
                   long long rows, long long columns, long long rows_per_block, long long across,
                   real smoothing, const real* class_weight) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const Aim aim{probabilities, labels, smoothing, real(1), nullptr, class_weight};
    const int lanes = int(across), lane = threadIdx.x % lanes;
    double sum = 0;
    for (long long i0 = first; i0 < last; i0 += THREADS / lanes) {
        const long long row = i0 + threadIdx.x / lanes;
        const bool here = row < last;  // all lanes take part in the sums of a row
        const long long i = here ? row : first;
        const real w = shares ? shares[i] : share;
        sum += loss_row(Z + i * columns, aim, i, here, w, dZ + i * columns, columns, lane, lanes);
    }
    // The same threads as above take the same elements of dZ: each reads what it wrote.
    column_partials(first, last, columns, lanes, partial + blockIdx.x * columns,
                    [&](long long i, long long j) { return dZ[i * columns + j]; });
    sum = block_sum(sum);
    if (threadIdx.x == 0) values[blockIdx.x] = sum;
}
