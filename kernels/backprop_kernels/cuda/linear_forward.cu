// linear_forward: Y = dropout(act(X Wᵀ + b)).  docs/derivations.md#linear_forward
//
// X (batch, in_features), W (out_features, in_features), b (out_features) or null     read
// Y, saved (batch, out_features) or null                                              written
// Fused: bias, activation, dropout. M = batch, N = out_features, K = in_features.
// One block per tile of Y; any batch, any width; 64-bit offsets; C-contiguous arrays of `real`.
#include "variant.cuh"
#include "epilogue.cuh"
#include "product.cuh"

template <class T>
DEVICE void forward(const real* X, const real* W, const real* b, real* Y, real* saved, long long M,
                    long long N, long long K, const long long* stream, long long layer,
                    long long threshold, real scale) {
    const long long across = (N + T::N - 1) / T::N;
    const long long m0 = blockIdx.x / across * T::M, n0 = blockIdx.x % across * T::N;
    Accumulators<T> sums;
    multiply<T, false, false>(X, K, W, K, M, N, m0, n0, 0, K, sums);
    KeepMask keep(stream, layer, threshold);
    for_each<T>(sums, M, N, m0, n0, [&](long long m, long long n, real sum) {
        const real z = b ? sum + b[n] : sum;
        Y[m * N + n] = forward_epilogue(z, m * N + n, saved, keep, scale);
    });
}

extern "C" __global__ void __launch_bounds__(Large::THREADS)
linear_forward_large(const real* X, const real* W, const real* b, real* Y, real* saved, long long M,
                     long long N, long long K, const long long* stream, long long layer,
                     long long threshold, real scale) {
    forward<Large>(X, W, b, Y, saved, M, N, K, stream, layer, threshold, scale);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS)
linear_forward_small(const real* X, const real* W, const real* b, real* Y, real* saved, long long M,
                     long long N, long long K, const long long* stream, long long layer,
                     long long threshold, real scale) {
    forward<Small>(X, W, b, Y, saved, M, N, K, stream, layer, threshold, scale);
}
