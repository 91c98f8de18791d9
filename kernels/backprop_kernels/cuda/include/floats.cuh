// The numbers a product multiplies: how they lie in memory, and their instruction on tensor cores.
// variant.cuh says which: `using operand = ...`, `using stored = ...`; sums are always `real`.
#pragma once
#include "ptx.cuh"

// 16 bits wide; arithmetic goes by float.
struct bf16 {
    unsigned short bits;
    DEVICE explicit bf16(float x) : bits(to_bf16(x)) {}
    DEVICE operator float() const { return from_bf16(bits); }
    static DEVICE u32 ready(u32 pair) { return pair; }
    static DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(d, a, b); }
};

struct fp16 {
    unsigned short bits;
    DEVICE explicit fp16(float x) : bits(to_fp16(x)) {}
    DEVICE operator float() const { return from_fp16(bits); }
    static DEVICE u32 ready(u32 pair) { return pair; }
    static DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_fp16(d, a, b); }
};

// In memory a float; rounded to 11 bits as it becomes an operand.
struct tf32 {
    static DEVICE u32 ready(u32 x) { return to_tf32(x); }
    static DEVICE void multiply_add(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_tf32(d, a, b); }
};
