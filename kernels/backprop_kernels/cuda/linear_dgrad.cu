// linear_dgrad: dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev.  docs/derivations.md#linear_dgrad
//
// dZ (batch, out_features), W (out_features, in_features)                            read
// saved: what the layer below kept, as epilogue.cuh has it, or null                  read
// unscale () or null: makes true sums of a dZ that is multiplied by the loss scale   read
// dZ_prev (batch, in_features), partial (runs of SUMMED_ROWS, in_features) or null     written
// dZ_prevᵀ, where Target has two maps (hopper_product.cuh)                             written
// cell: raised to the largest magnitude of dZ_prev (largest.cuh), or null             read and written
// Fused: the layer below's dropout mask and activation derivative; partial column sums of dZ_prev,
// which column_sums.cu adds up to db_prev in order.
// M = batch, N = in_features, K = out_features. By tiles of dZ_prev; 64-bit offsets.
#include "variant.cuh"
#include "epilogue.cuh"
#include "largest.cuh"
#include PRODUCT

extern "C" __global__ void BY_TILES
linear_dgrad(const __grid_constant__ Matrix dZ, const __grid_constant__ Matrix W, const kept* saved,
             const real* unscale, const __grid_constant__ Target<result> dZ_prev, real* partial,
             long long M, long long N, long long K, const long long* stream, const long long* before, long long layer,
             long long threshold, real scale, u32* cell) {
    for_each_tile<false, true>(dZ, W, M, N, K, Uncut(), [&](Corner at, const Sums& sums) {
        KeepMask keep(stream, before, layer, threshold);
        Largest largest{cell};
        const auto of = [&](long long m, long long n) { return read_saved(saved, m, min(n, N - 1), N); };
        const auto element = [&](long long m, long long n, real sum, Saved of) {
            const real g = n < N ? backward_epilogue(sum, m, n, N, of, keep, scale) : real(0);
            largest.see(real(result(g)));
            return g;
        };
        write_tile(sums, M, N, at, dZ_prev, of, element, [&](long long n, real total) {
            if (partial) partial[at.m / SUMMED_ROWS * N + n] = unscale ? total * *unscale : total;
        });
        largest.keep();
    });
}
