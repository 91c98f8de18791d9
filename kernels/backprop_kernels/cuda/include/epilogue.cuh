// What follows a product or a norm, element by element, and its reverse for the layer below.
//
// variant.cuh gives `activation(z)`, `derivative(of)` and what backward needs, SAVES: 0 nothing; 1 Y,
// 2 Z, as an array of `kept` like Y; 3 where act' is FLAT or STEEP a bit that says which: column j in
// bit j % 32 of word j / 32 of its row.
#pragma once
#include "philox.cuh"
#include "ptx.cuh"

constexpr int SAVED_AS_BITS = 3, WORD = 32;

// Words of bits that a row takes.
DEVICE long long words(long long columns) { return (columns + WORD - 1) / WORD; }

// y = dropout(act(z)) of an element; what backward needs goes to `saved` where that is not null.
// A warp comes together, its lanes at neighbouring columns of a row that starts at a lane of column 0
// or 32 n; narrower rows than 32 lie side by side. Lanes that have no element are not `inside`.
DEVICE real forward_epilogue(real z, long long row, long long column, long long columns, bool inside,
                             kept* saved, KeepMask& keep, real scale) {
    const real y = activation(z);
    const long long element = row * columns + column;
    if (SAVES == SAVED_AS_BITS && saved) {
        u32 bits = __ballot_sync(0xffffffffu, inside && derivative(z) != FLAT) >> threadIdx.x % WORD;
        if (columns < WORD) bits &= (1u << columns) - 1;  // the rest are the next rows'
        if (inside && column % WORD == 0) saved[row * words(columns) + column / WORD] = kept(bits);
    } else if (SAVES && saved && inside) {
        saved[element] = kept(SAVES == 1 ? y : z);
    }
    if (!keep.drops) return y;
    return keep(keep.rows() * columns + element) ? y * scale : real(0);
}

// What `saved` says of an element: Y or Z, or the word with its bit.
struct Saved {
    real value;
    u32 bits;
};
DEVICE Saved read_saved(const kept* saved, long long row, long long column, long long columns) {
    const long long element = row * columns + column;
    if (SAVES == SAVED_AS_BITS) return {real(0), u32(saved[row * words(columns) + column / WORD])};
    return {SAVES ? real(saved[element]) : real(0), 0};
}

// dZ of the layer below, from the gradient g of an element of its output.
DEVICE real backward_epilogue(real g, long long row, long long column, long long columns, Saved saved,
                              KeepMask& keep, real scale) {
    if (keep.drops) g = keep((keep.rows() + row) * columns + column) ? g * scale : real(0);
    if (SAVES == SAVED_AS_BITS) return g * (saved.bits >> column % WORD & 1 ? STEEP : FLAT);
    return g * derivative(saved.value);
}
