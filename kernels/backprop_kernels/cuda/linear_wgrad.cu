// linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad
//
// dZ (batch, out_features), X (batch, in_features)        read
// dW (splits, out_features, in_features)                  written
// The batch is cut into `splits` runs of `rows_per_split`; with more than one, dW is a workspace
// whose slices column_sums.cu adds in order.
// M = out_features, N = in_features, K = batch. One block per tile of dW (grid x) and split (grid y).
#include "variant.cuh"
#include "product.cuh"

template <class T>
DEVICE void wgrad(const real* dZ, const real* X, real* dW, long long M, long long N, long long K,
                  long long rows_per_split) {
    const long long across = (N + T::N - 1) / T::N;
    const long long m0 = blockIdx.x / across * T::M, n0 = blockIdx.x % across * T::N;
    const long long k0 = blockIdx.y * rows_per_split, k_end = min(k0 + rows_per_split, K);
    Accumulators<T> sums;
    multiply<T, true, true>(dZ, M, X, N, M, N, m0, n0, k0, k_end, sums);
    real* slice = dW + blockIdx.y * M * N;
    for_each<T>(sums, M, N, m0, n0,
                [&](long long m, long long n, real sum) { slice[m * N + n] = sum; });
}

extern "C" __global__ void __launch_bounds__(Large::THREADS)
linear_wgrad_large(const real* dZ, const real* X, real* dW, long long M, long long N, long long K,
                   long long rows_per_split) {
    wgrad<Large>(dZ, X, dW, M, N, K, rows_per_split);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS)
linear_wgrad_small(const real* dZ, const real* X, real* dW, long long M, long long N, long long K,
                   long long rows_per_split) {
    wgrad<Small>(dZ, X, dW, M, N, K, rows_per_split);
}
