// cast: out = values · factor, rounded to what lies in memory.
//
// values (size), factor () or null, which is 1     read
// out (size) of `stored`                           written
// cell: raised to the largest magnitude of `out` (largest.cuh), or null   read and written
// Every thread takes every so-many-th element; 64-bit offsets.
#include "variant.cuh"
#include "largest.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
cast(const real* values, const real* factor, stored* out, u32* cell, long long size) {
    const real by = factor ? *factor : real(1);
    Largest largest{cell};
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < size;
         i += gridDim.x * (long long)THREADS) {
        out[i] = stored(values[i] * by);
        largest.see(real(out[i]));
    }
    largest.keep();
}
