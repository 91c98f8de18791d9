// What a loss is taken of: targets or class ids, and the options of the loss.
#pragma once
#include "ptx.cuh"

struct Aim {
    const real* target;           // (rows, columns), or null where there are
    const label_t* labels;        // (rows)
    real a, b;                    // options: numbers, or
    const real *each_a, *each_b;  // one for each column
};
