// linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad
//
// dZ (batch, out_features), X (batch, in_features)                                      read
// unscale () or null: makes a true dW of a dZ that is multiplied by the loss scale      read
// dW (splits, out_features, in_features)                                                written
// The batch is cut into `splits` runs of `rows_per_split`; with more than one, dW is a workspace
// whose slices column_sums.cu adds in order.
// M = out_features, N = in_features, K = batch. One block per tile of dW (grid x) and split (grid y).
#include "variant.cuh"
#include PRODUCT

extern "C" __global__ void __launch_bounds__(Tile::THREADS, 1)
linear_wgrad(const stored* dZ, const stored* X, const real* unscale, real* dW, long long M,
             long long N, long long K, long long rows_per_split) {
    const Corner at = corner<Tile>(blockIdx.x, M, N);
    const long long k0 = blockIdx.y * rows_per_split, k_end = min(k0 + rows_per_split, K);
    Sums sums;
    multiply<true, true>(dZ, M, X, N, M, N, at, k0, k_end, sums);
    const real factor = unscale ? *unscale : real(1);
    real* slice = dW + blockIdx.y * M * N;
    for_each(sums, M, N, at, [&](long long m, long long n, real sum) {
        if (n < N) slice[m * N + n] = sum * factor;
    });
}
