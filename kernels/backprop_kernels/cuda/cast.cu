// cast: out = values · factor, rounded to what lies in memory.
//
// values (size), factor () or null, which is 1     read
// out (size) of `stored`                           written
// Every thread takes every so-many-th element; 64-bit offsets.
#include "variant.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
cast(const real* values, const real* factor, stored* out, long long size) {
    const real by = factor ? *factor : real(1);
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < size;
         i += gridDim.x * (long long)THREADS)
        out[i] = stored(values[i] * by);
}
