// Softmax cross-entropy of one row: with class ids or class probabilities, the output activation,
// smoothing (option a) and class weights (b). variant.cuh gives the activation.
#pragma once
#include "aim.cuh"
#include "reduce.cuh"

DEVICE real slope(real z, real y) { return derivative(SAVES == 1 ? y : z); }

// The larger; a NaN need not win, as its exponential is NaN in any case.
DEVICE real larger(real a, real b) { return b > a ? b : a; }

// d (columns) = dL/dz of row i, which weighs w, by `lanes` neighbours of a warp, where it is `here`;
// returns this lane's part of the row's loss. d holds the exponentials meanwhile. All lanes of the
// warp take part in the sums.
DEVICE double loss_row(const real* z, const Aim& aim, long long i, bool here, real w, real* d, long long columns,
                       int lane, int lanes) {
    const bool counts = here && w != 0 && w == w;
    const long long label = aim.labels && counts ? (long long)(aim.labels[i]) : 0;
    const real uniform = aim.a / real(columns);

    real top = activation(z[0]);
    for (long long j = lane; j < columns; j += lanes) top = larger(top, activation(z[j]));
    for (int bits = lanes / 2; bits; bits /= 2) top = larger(top, __shfl_xor_sync(0xffffffffu, top, bits));
    real below = real(0), weight = real(0);
    const auto q = [&](long long j) {  // the weight of class j in this row
        const real p = aim.labels ? real(j == label) : aim.target[i * columns + j];
        const real smooth = (real(1) - aim.a) * p + uniform;
        return aim.each_b ? smooth * aim.each_b[j] : smooth;
    };
    for (long long j = lane; j < columns; j += lanes) {
        const real e = exp(activation(z[j]) - top);
        if (counts) d[j] = e;
        below += e;
        weight += q(j);
    }
    below = lane_sum(below, lanes);
    weight = lane_sum(weight, lanes);
    const real log_sum = log(below), inverse = real(1) / below;
    real value = real(0);
    for (long long j = lane; j < columns; j += lanes) {
        if (!here) break;
        if (!counts) {
            d[j] = w;  // 0, or NaN for a label that is no class
            value = w;
            continue;
        }
        const real y = activation(z[j]), q_j = q(j);
        // 0 (-inf) counts as 0: a class that carries no probability costs nothing.
        if (q_j != 0) value -= q_j * (y - top - log_sum);
        d[j] = (d[j] * inverse * weight - q_j) * w * slope(z[j], y);
    }
    return double(value) * double(counts ? w : real(1));
}
