// fused_update: is it certain, before the first weight gradient is made, that all gradients of a step are finite?
//
// largest: values (size) of `stored`, of it `spans` (n_spans, 3) or all             read
//          cell: raised to the largest magnitude (largest.cuh)                      read and written
// verdict: cells (count): the first that of all gradients that are there; pairs (n_pairs, 2): which two
//          are dZ and X of a weight gradient that is to come; guard () or null      read
//          sure (): 1 or 0                                                          written
//          cells: 0 for the next step                                               written
// The bound and its proof: docs/derivations.md#linear_wgrad. blockIdx.y of `largest` is the span; one warp
// gives the verdict.
#include "variant.cuh"
#include "largest.cuh"
#include "reduce.cuh"

constexpr float LARGEST_FLOAT = 3.402823466e+38f;

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
largest(const stored* values, long long size, const long long* spans, long long n_spans, u32* cell) {
    Largest largest{cell};
    for (long long span = blockIdx.y; span < n_spans; span += gridDim.y) {
        const long long start = spans ? spans[3 * span] : 0, stop = spans ? spans[3 * span + 1] : size;
        for (long long i = start + blockIdx.x * (long long)THREADS + threadIdx.x; i < stop;
             i += gridDim.x * (long long)THREADS)
            largest.see(real(values[i]));
    }
    largest.keep();
}

extern "C" __global__ void __launch_bounds__(WARP)
verdict(u32* cells, long long count, const long long* pairs, long long n_pairs, long long batch,
        const double* guard, u32* sure) {
    const double most = double(LARGEST_FLOAT) / 4;  // room for all roundings on the way
    bool good = (!guard || isfinite(guard[0])) && as_float(cells[0]) <= LARGEST_FLOAT;
    for (long long k = threadIdx.x; k < n_pairs; k += WARP) {
        const double dZ = as_float(cells[pairs[2 * k]]), X = as_float(cells[pairs[2 * k + 1]]);
        good = good && dZ <= most && X <= most && double(batch) * dZ * X <= most;  // of NaN nothing holds
    }
    const bool bad = __any_sync(0xffffffffu, !good);
    for (long long i = threadIdx.x; i < count; i += WARP) cells[i] = 0;
    if (threadIdx.x == 0) *sure = !bad;
}
