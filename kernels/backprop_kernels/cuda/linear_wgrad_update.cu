// linear_wgrad_update: linear_wgrad.cu, and the optimizer's update of W by that dW, which is never in memory.
//
// dZ (batch, out_features), X (batch, in_features)                                     read
// scalars (SCALARS): of this tensor, as optimizer_step.cu takes them                   read
// sure (): whether all gradients of this step are certain to be finite                 read
// W, moment0, moment1 (out_features, in_features); `target` is W as products write     read and written
// squares: of dW, a sum for every warp of every tile                                   written
// dW (out_features, in_features): where it is not sure. W and its moments keep their bits then.  written
// M = out_features, N = in_features, K = batch. By tiles of dW; a batch in runs goes through `unfinished`.
#include "variant.cuh"
#include "reduce.cuh"
#include PRODUCT

struct Element {
    real w, moment0, moment1;
};

extern "C" __global__ void BY_TILES
linear_wgrad_update(const __grid_constant__ Matrix dZ, const __grid_constant__ Matrix X,
                    const __grid_constant__ Target<real> target, const real* W, real* moment0, real* moment1,
                    real* dW, const double* scalars, const u32* sure, double* squares, real* unfinished,
                    u32* turns, long long M, long long N, long long K, long long rows_per_run) {
    const Cut<FRESH> cut{rows_per_run, unfinished, turns};
    for_each_tile<true, true>(dZ, X, M, N, K, cut, [&](Corner at, const Sums& sums) {
        const bool apply = *sure != 0;
        real c[SCALARS];
#pragma unroll
        for (int k = 0; k < SCALARS; ++k) c[k] = real(scalars[k]);
        double square = 0;
        const auto read = [&](long long m, long long n) {
            const long long i = m * N + min(n, N - 1);
            return Element{W[i], moment0[i], STATES == 2 ? moment1[i] : real(0)};
        };
        write_tile(sums, M, N, at, target, read, [&](long long m, long long n, real g, Element of) {
            if (n >= N) return real(0);
            const long long i = m * N + n;
            if (!apply) {
                dW[i] = g;
                return of.w;
            }
            square += double(g) * double(g);
            real s[2] = {of.moment0, of.moment1};
            step(of.w, g, s, c);
            moment0[i] = s[0];
            if (STATES == 2) moment1[i] = s[1];
            return of.w;
        });
        square = lane_sum(square);
        const long long tile = at.m / SUMMED_ROWS * ((N + Tile::N - 1) / Tile::N) + at.n / Tile::N;
        const int warp = threadIdx.x % WRITERS / WARP;
        if (threadIdx.x % WARP == 0) squares[tile * (WRITERS / WARP) + warp] = square;
    });
}
