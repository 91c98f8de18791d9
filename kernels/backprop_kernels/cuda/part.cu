// part: the gradient of a batch that came in parts, where these did not weigh `whole` in all: fewer or
// smaller parts, weights of rows or classes, ignored rows.
//
// mass (): what all rows weighed     read
// G (size): times whole / mass       read and written; untouched where that is 1, or where nothing weighed anything
#include "variant.cuh"
#include "reduce.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
to_mean(real* G, const double* mass, long long whole, long long size) {
    if (*mass == double(whole) || *mass == 0) return;
    const real factor = real(double(whole) / *mass);
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < size;
         i += gridDim.x * (long long)THREADS)
        G[i] *= factor;
}
