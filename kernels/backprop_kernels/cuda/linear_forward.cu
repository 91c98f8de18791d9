// linear_forward: Y = dropout(act(X Wᵀ + b)).  docs/derivations.md#linear_forward
//
// X (batch, in_features), W (out_features, in_features), b (out_features) or null     read
// Y (batch, out_features), saved: as epilogue.cuh has it, or null                     written
// Fused: bias, activation, dropout. M = batch, N = out_features, K = in_features.
// One block per tile of Y; any batch, any width; 64-bit offsets; C-contiguous arrays.
#include "variant.cuh"
#include "epilogue.cuh"
#include PRODUCT

extern "C" __global__ void __launch_bounds__(Tile::THREADS, 1)
linear_forward(const stored* X, const stored* W, const real* b, result* Y, kept* saved, long long M,
               long long N, long long K, const long long* stream, long long layer,
               long long threshold, real scale) {
    const Corner at = corner<Tile>(blockIdx.x, M, N);
    Sums sums;
    multiply<false, false>(X, K, W, K, M, N, at, 0, K, sums);
    KeepMask keep(stream, layer, threshold);
    for_each(sums, M, N, at, [&](long long m, long long n, real sum) {
        const bool inside = n < N;
        const real z = b && inside ? sum + b[n] : sum;
        const real y = forward_epilogue(z, m, n, N, inside, saved, keep, scale);
        if (inside) Y[m * N + n] = result(y);
    });
}
