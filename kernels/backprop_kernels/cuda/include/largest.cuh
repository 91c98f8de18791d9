// The largest magnitude of what a kernel writes, for whoever bounds the sums that will be made of it.
//
// As bits of a float, whose order is that of magnitudes; those of infinity are larger than any
// number's, those of NaN larger still. So a maximum of bits notices both, and it is the same
// whoever comes first.
#pragma once
#include "ptx.cuh"

struct Largest {
    u32* cell;  // or null, where nobody asks
    u32 top = 0;
    DEVICE void see(float x) { top = max(top, as_bits(x) & 0x7fffffffu); }
    DEVICE void see(double) {}  // nobody asks in float64
    // By whole warps, once they have seen all.
    DEVICE void keep() {
        if (!cell) return;
        for (int bits = 16; bits; bits /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, bits));
        if (threadIdx.x % 32 == 0) raise_to(cell, top);
    }
};
