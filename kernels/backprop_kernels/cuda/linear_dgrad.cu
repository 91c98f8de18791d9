// linear_dgrad: dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev.  docs/derivations.md#linear_dgrad
//
// dZ (batch, out_features), W (out_features, in_features)                            read
// saved: what the layer below kept, as epilogue.cuh has it, or null                  read
// unscale () or null: makes true sums of a dZ that is multiplied by the loss scale   read
// dZ_prev (batch, in_features), partial (row tiles, in_features) or null             written
// Fused: the layer below's dropout mask and activation derivative; partial column sums of dZ_prev,
// which column_sums.cu adds up to db_prev in order.
// M = batch, N = in_features, K = out_features. One block per tile of dZ_prev; 64-bit offsets.
#include "variant.cuh"
#include "epilogue.cuh"
#include PRODUCT

extern "C" __global__ void __launch_bounds__(Tile::THREADS, 1)
linear_dgrad(const stored* dZ, const stored* W, const kept* saved, const real* unscale,
             stored* dZ_prev, real* partial, long long M, long long N, long long K,
             const long long* stream, long long layer, long long threshold, real scale) {
    const Corner at = corner<Tile>(blockIdx.x, M, N);
    Sums sums;
    multiply<false, true>(dZ, K, W, N, M, N, at, 0, K, sums);
    KeepMask keep(stream, layer, threshold);
    real column_sum = real(0);
    for_each(sums, M, N, at, [&](long long m, long long n, real sum) {
        if (n >= N) return;
        const real d = backward_epilogue(sum, m, n, N, saved, keep, scale);
        dZ_prev[m * N + n] = stored(d);
        column_sum += d;
    });
    if (!partial) return;
    constexpr int PARTS = Tile::THREADS / Tile::N;  // threads that share a column
    __shared__ real s_sums[PARTS][Tile::N];
    const int column = threadIdx.x % Tile::N, part = threadIdx.x / Tile::N;
    s_sums[part][column] = column_sum;
    __syncthreads();
    if (part || at.n + column >= N) return;
    for (int i = 1; i < PARTS; ++i) column_sum += s_sums[i][column];
    partial[at.m / Tile::M * N + at.n + column] = unscale ? column_sum * *unscale : column_sum;
}
