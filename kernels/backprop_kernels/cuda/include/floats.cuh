// The numbers a product multiplies: how they lie in memory, and their instruction on tensor cores.
// variant.cuh says which: `using operand = ...`, `using stored = ...`; sums are always `real`.
//
// An operand makes of FRAGMENTS pieces of 32 bytes of K, as they lie in memory, PLANES factors for
// the instruction; `OF_B` says of which side of the product they are.
#pragma once
#include "ptx.cuh"

// One factor, of the bits that lie in memory.
struct AsStored {
    static constexpr int FRAGMENTS = 1, PLANES = 1;
    template <bool OF_B> static DEVICE void ready(u32 (&planes)[1][4], const u32 (&from)[1][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) planes[0][i] = from[0][i];
    }
};

// 16 bits wide; arithmetic goes by float.
struct bf16 : AsStored {
    unsigned short bits;
    DEVICE explicit bf16(float x) : bits(to_bf16(x)) {}
    DEVICE operator float() const { return from_bf16(bits); }
    static DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(d, a, b); }
    template <bool A_BY_K, bool B_BY_K, int COUNT>
    static DEVICE void multiply_group(float (&d)[COUNT], u64 a, u64 b, int keep) {
        wgmma_bf16<A_BY_K, B_BY_K>(d, a, b, keep);
    }
};

struct fp16 : AsStored {
    unsigned short bits;
    DEVICE explicit fp16(float x) : bits(to_fp16(x)) {}
    DEVICE operator float() const { return from_fp16(bits); }
    static DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_fp16(d, a, b); }
    template <bool A_BY_K, bool B_BY_K, int COUNT>
    static DEVICE void multiply_group(float (&d)[COUNT], u64 a, u64 b, int keep) {
        wgmma_fp16<A_BY_K, B_BY_K>(d, a, b, keep);
    }
};

// In memory a float; rounded to 11 bits as it becomes an operand, or for wgmma as it is stored.
struct tf32 {
    static constexpr int FRAGMENTS = 1, PLANES = 1;
    float value;
    DEVICE explicit tf32(float x) : value(as_float(to_tf32(as_bits(x)))) {}
    DEVICE operator float() const { return value; }
    template <bool OF_B> static DEVICE void ready(u32 (&planes)[1][4], const u32 (&from)[1][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) planes[0][i] = to_tf32(from[0][i]);
    }
    static DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_tf32(d, a, b); }
    template <bool, bool, int COUNT> static DEVICE void multiply_group(float (&d)[COUNT], u64 a, u64 b, int keep) {
        wgmma_tf32(d, a, b, keep);
    }
};

// In memory a float; as operand the sum of COUNT bfloat16, each the nearest to what those before it
// leave over. Two hold 16 of its 24 bits, three hold all. Infinity stays in the last of them.
template <int COUNT> struct bf16_planes {
    static constexpr int FRAGMENTS = 2, PLANES = COUNT;

    // A thread's floats of a fragment lie 4 columns of K apart; in both factors, the two of a row are
    // taken for neighbours. So K is added up in another order than it lies, which is as good.
    template <bool OF_B> static DEVICE void ready(u32 (&planes)[COUNT][4], const u32 (&from)[2][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int fragment = OF_B ? i % 2 : i / 2, first = OF_B ? i / 2 * 2 : i % 2;
            float low = as_float(from[fragment][first]), high = as_float(from[fragment][first + (OF_B ? 1 : 2)]);
#pragma unroll
            for (int p = 0; p < COUNT; ++p) {
                planes[p][i] = p + 1 < COUNT ? to_finite_bf16_pair(low, high) : to_bf16_pair(low, high);
                low -= from_bf16(planes[p][i] & 0xffff);
                high -= from_bf16(planes[p][i] >> 16);
            }
        }
    }
    static DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(d, a, b); }
};
