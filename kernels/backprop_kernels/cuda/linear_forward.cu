// linear_forward: Y = dropout(act(X Wᵀ + b)).  docs/derivations.md#linear_forward
//
// X (batch, in_features), W (out_features, in_features), b (out_features) or null     read
// Y (batch, out_features), saved: as epilogue.cuh has it, or null                     written
// Yᵀ, where Target has two maps (hopper_product.cuh)                                  written
// cell: raised to the largest magnitude of Y (largest.cuh), or null                   read and written
// Fused: bias, activation, dropout. M = batch, N = out_features, K = in_features.
// By tiles of Y; any batch, any width; 64-bit offsets; C-contiguous arrays.
#include "variant.cuh"
#include "epilogue.cuh"
#include "largest.cuh"
#include PRODUCT

extern "C" __global__ void BY_TILES
linear_forward(const __grid_constant__ Matrix X, const __grid_constant__ Matrix W, const real* b,
               const __grid_constant__ Target<result> Y, kept* saved, long long M, long long N,
               long long K, const long long* stream, const long long* before, long long layer,
               long long threshold, real scale, u32* cell) {
    for_each_tile<false, false>(X, W, M, N, K, Uncut(), [&](Corner at, const Sums& sums) {
        KeepMask keep(stream, before, layer, threshold);
        Largest largest{cell};
        const auto bias = [&](long long, long long n) { return b && n < N ? b[n] : real(0); };
        write_tile(sums, M, N, at, Y, bias, [&](long long m, long long n, real sum, real bias) {
            const real y = forward_epilogue(sum + bias, m, n, N, n < N, saved, keep, scale);
            if (n < N) largest.see(real(result(y)));
            return y;
        });
        largest.keep();
    });
}
