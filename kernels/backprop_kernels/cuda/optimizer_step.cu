// optimizer_step: one update of the flat arena, or none.  docs/derivations.md#optimizer_step
//
// G (parameters), scalars (rows, 1 + SCALARS), guard () or null, spans (count, 3) or null    read
// P, state (parameters)                                                            read and written
// sure () or null: where it is not 0, only `left` (n_left, 3) is left to do, spans like the others; the
// squares of all other gradients are in done (n_done), and their elements of G are not read    read
// squares (blocks), norm ()                                                                 written
// Fused into the update: the finite check, clipping, decay and penalties.
// gradient_squares: every block sums the squares of every so-many-th element. optimizer_update: every
// block adds those sums up in order, so all agree on whether to change anything; blockIdx.y is the
// span. Numbers of the step are read from the device, so that a captured graph sees new ones.
#include "variant.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
gradient_squares(const real* G, double* squares, long long size, const u32* sure, const long long* left,
                 long long n_left, const double* done, long long n_done) {
    double sum = 0;
    if (sure && *sure) {
        for (long long k = 0; k < n_left; ++k)
            sum += square_share(G + left[3 * k], left[3 * k + 1] - left[3 * k]);
        for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < n_done;
             i += gridDim.x * (long long)THREADS)
            sum += done[i];
    } else {
        sum = square_share(G, size);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
optimizer_update(real* P, const real* G, real* state0, real* state1, const double* scalars,
                 const double* guard, const double* squares, long long count, double* norm,
                 long long size, const long long* spans, long long n_spans, const u32* sure,
                 const long long* left, long long n_left) {
    const double length = sqrt(array_sum(squares, count));
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) norm[0] = length;
    if (!isfinite(length) || (guard && !isfinite(guard[0]))) return;
    if (sure && *sure) {
        spans = left;
        n_spans = n_left;
    }
    for (long long span = blockIdx.y; span < n_spans; span += gridDim.y) {
        const long long start = spans ? spans[3 * span] : 0;
        const long long stop = spans ? spans[3 * span + 1] : size;
        const double* numbers = scalars + (spans ? spans[3 * span + 2] * (1 + SCALARS) : 0);
        const double most = numbers[0] / (length + 1e-6);
        const real clip = real(most < 1.0 ? most : 1.0);
        real c[SCALARS];
#pragma unroll
        for (int k = 0; k < SCALARS; ++k) c[k] = real(numbers[1 + k]);
        for (long long i = start + blockIdx.x * (long long)THREADS + threadIdx.x; i < stop;
             i += gridDim.x * (long long)THREADS) {
            real s[2] = {state0[i], STATES == 2 ? state1[i] : real(0)};
            real p = P[i];
            step(p, rounded_product(G[i], clip), s, c);
            P[i] = p;
            state0[i] = s[0];
            if (STATES == 2) state1[i] = s[1];
        }
    }
}
