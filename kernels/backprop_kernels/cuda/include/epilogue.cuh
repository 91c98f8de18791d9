// What follows a product or a norm, element by element, and its reverse for the layer below.
// variant.cuh gives `activation(z)`, `derivative(saved)` and SAVES: 0 nothing, 1 Y, 2 Z; arrays of
// `stored` hold what backward needs.
#pragma once
#include "philox.cuh"
#include "ptx.cuh"

// Y = dropout(act(z)), and what backward needs, kept where `saved` is not null.
DEVICE real forward_epilogue(real z, long long element, stored* saved, KeepMask& keep, real scale) {
    const real y = activation(z);
    if (SAVES && saved) saved[element] = stored(SAVES == 1 ? y : z);
    if (!keep.drops) return y;
    return keep(element) ? y * scale : real(0);
}

// dZ of the layer below, from the gradient g of its output.
DEVICE real backward_epilogue(real g, long long element, const stored* saved, KeepMask& keep, real scale) {
    if (keep.drops) g = keep(element) ? g * scale : real(0);
    return g * derivative(SAVES ? real(saved[element]) : real(0));
}
