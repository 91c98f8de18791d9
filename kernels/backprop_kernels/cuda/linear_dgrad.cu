// linear_dgrad: dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev.  docs/derivations.md#linear_dgrad
//
// dZ (batch, out_features), W (out_features, in_features)                            read
// saved (batch, in_features): what the layer below kept, or null                     read
// dZ_prev (batch, in_features), partial (row tiles, in_features) or null             written
// Fused: the layer below's dropout mask and activation derivative; partial column sums of dZ_prev,
// which column_sums.cu adds up to db_prev in order.
// M = batch, N = in_features, K = out_features. One block per tile of dZ_prev; 64-bit offsets.
#include "variant.cuh"
#include "epilogue.cuh"
#include "product.cuh"

template <class T>
static DEVICE void dgrad(const real* dZ, const real* W, const real* saved, real* dZ_prev, real* partial,
                  long long M, long long N, long long K, const long long* stream, long long layer,
                  long long threshold, real scale) {
    const long long across = (N + T::N - 1) / T::N;
    const long long m0 = blockIdx.x / across * T::M, n0 = blockIdx.x % across * T::N;
    Accumulators<T> sums;
    multiply<T, false, true>(dZ, K, W, N, M, N, m0, n0, 0, K, sums);
    KeepMask keep(stream, layer, threshold);
    real column_sum = real(0);
    for_each<T>(sums, M, N, m0, n0, [&](long long m, long long n, real sum) {
        const real d = backward_epilogue(sum, m * N + n, saved, keep, scale);
        dZ_prev[m * N + n] = d;
        column_sum += d;
    });
    if (!partial) return;
    constexpr int PARTS = T::THREADS / T::N;  // threads that share a column
    __shared__ real s_sums[PARTS][T::N];
    const int column = threadIdx.x % T::N, part = threadIdx.x / T::N;
    s_sums[part][column] = column_sum;
    __syncthreads();
    if (part || n0 + column >= N) return;
    for (int i = 1; i < PARTS; ++i) column_sum += s_sums[i][column];
    partial[m0 / T::M * N + n0 + column] = column_sum;
}

extern "C" __global__ void __launch_bounds__(Large::THREADS)
linear_dgrad_large(const real* dZ, const real* W, const real* saved, real* dZ_prev, real* partial,
                   long long M, long long N, long long K, const long long* stream, long long layer,
                   long long threshold, real scale) {
    dgrad<Large>(dZ, W, saved, dZ_prev, partial, M, N, K, stream, layer, threshold, scale);
}

extern "C" __global__ void __launch_bounds__(Small::THREADS)
linear_dgrad_small(const real* dZ, const real* W, const real* saved, real* dZ_prev, real* partial,
                   long long M, long long N, long long K, const long long* stream, long long layer,
                   long long threshold, real scale) {
    dgrad<Small>(dZ, W, saved, dZ_prev, partial, M, N, K, stream, layer, threshold, scale);
}
