// linear_wgrad: dW = dZᵀ X.  docs/derivations.md#linear_wgrad
//
// dZ (batch, out_features), X (batch, in_features)                                      read
// unscale () or null: makes a true dW of a dZ that is multiplied by the loss scale      read
// dW (slices, out_features, in_features)                                                written
// The batch is cut into runs of `rows_per_run`. Their sums are slices that column_sums.cu adds in order,
// or (hopper_product.cuh) go through `unfinished`, in the order that `turns` counts. `SUMS_FROM` (corner.cuh)
// says how sums go on from `earlier`, which is dW, where rows came `before` () these.
// M = out_features, N = in_features, K = batch. By tiles of dW.
#include "variant.cuh"
#include PRODUCT

extern "C" __global__ void BY_TILES
linear_wgrad(const __grid_constant__ Matrix dZ, const __grid_constant__ Matrix X, const real* unscale,
             const __grid_constant__ Target<real> dW, real* unfinished, u32* turns, const real* earlier,
             const long long* before, long long M, long long N, long long K, long long rows_per_run) {
    const real factor = unscale ? *unscale : real(1);
    const Cut<SUMS_FROM> cut{rows_per_run, unfinished, turns, earlier, before};
    for_each_tile<true, true>(dZ, X, M, N, K, cut, [&](Corner at, const Sums& sums) {
        const auto nothing = [](long long, long long) { return 0; };
        write_tile(sums, M, N, at, dW, nothing, [&](long long, long long, real sum, int) { return sum * factor; });
    });
}
