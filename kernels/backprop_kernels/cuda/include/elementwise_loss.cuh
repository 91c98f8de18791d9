// The losses of one output and its target. variant.cuh gives `value` and `gradient` by z of
// (z, t, option a, option b).
#pragma once
#include "aim.cuh"

// dL/dz of output j of row i, which weighs w; `mean` is 1 over the outputs. Σ of the outputs' losses
// goes to `sum`.
DEVICE real loss_element(real z, const Aim& aim, long long i, long long j, long long columns, real w, real mean,
                         double& sum) {
    real g = real(0);
    if (w != 0) {  // a weight of 0 removes its row, even one whose loss is infinite
        const real p = aim.each_a ? aim.each_a[j] : aim.a, q = aim.each_b ? aim.each_b[j] : aim.b;
        const real t = aim.target[i * columns + j];
        sum += double(value(z, t, p, q)) * double(w);
        g = gradient(z, t, p, q) * mean * w;
    }
    return g;
}

// d (columns) = dL/dz of row i, by `lanes` neighbours of a warp, where it is `here`; returns this
// lane's part of the row's loss.
DEVICE double loss_row(const real* z, const Aim& aim, long long i, bool here, real w, real* d, long long columns,
                       int lane, int lanes) {
    const real mean = real(1) / real(columns);
    double sum = 0;
    for (long long j = lane; here && j < columns; j += lanes)
        d[j] = loss_element(z[j], aim, i, j, columns, w, mean, sum);
    return sum / double(columns);
}
