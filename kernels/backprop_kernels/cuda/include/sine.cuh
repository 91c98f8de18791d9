// sin(x + quarter pi/2) for quarter 0 (sin) or 1 (cos): within 2 ulp for |x| <= 1e5 (float) or 1e9
// (double), beyond that only in [-1, 1]. Cody and Waite's reduction to |r| <= pi/4, then our own
// minimax fits, as in cpu/vector_math.py. CUDA's sin reduces any argument, and needs float64
// instructions and local memory for that even in float.
#pragma once

DEVICE real sine(real x, int quarter) {
    constexpr bool narrow = sizeof(real) == 4;
    const real n = rint(fabs(x) * real(0.6366197723675814));
    // pi/2 in three parts; the first step is exact, given one rounding.
    real r = fma(n, real(narrow ? -1.5707963705062866 : -1.5707963267948966), fabs(x));
    r = fma(n, real(narrow ? 4.371138828673793e-08 : -6.123233995736766e-17), r);
    r = fma(n, real(narrow ? 1.7151245100058819e-15 : 1.4973849048591698e-33), r);
    r = r > real(0.8) ? real(0.8) : r < real(-0.8) ? real(-0.8) : r;  // n too large to hold
    const real z = r * r;
    real s, c;  // (sin r - r)/r^3 and (cos r - 1 + r^2/2)/r^4 in z
    if constexpr (narrow) {
        s = fma(z, real(-0.00019506023090798408), real(0.00833209790289402));
        s = fma(s, z, real(-0.16666653752326965));
        c = fma(z, real(2.4428643882856704e-05), real(-0.0013887290842831135));
        c = fma(c, z, real(0.04166664555668831));
    } else {
        s = fma(z, real(1.589491065412258e-10), real(-2.5050726640035928e-08));
        s = fma(s, z, real(2.755731349867895e-06));
        s = fma(s, z, real(-0.00019841269829276906));
        s = fma(s, z, real(0.008333333333321787));
        s = fma(s, z, real(-0.1666666666666663));
        c = fma(z, real(-1.1358400867695984e-11), real(2.087569997790945e-09));
        c = fma(c, z, real(-2.755731418730385e-07));
        c = fma(c, z, real(2.4801587288935282e-05));
        c = fma(c, z, real(-0.0013888888888873292));
        c = fma(c, z, real(0.041666666666666595));
    }
    s = fma(r * z, s, r);
    c = fma(z * z, c, fma(z, real(-0.5), real(1)));
    const real turn = n + real(quarter);
    const real quadrant = turn - real(4) * floor(turn * real(0.25));
    const real y = quadrant == real(1) || quadrant == real(3) ? c : s;
    const real upright = quadrant >= real(2) ? -y : y;
    return quarter == 0 ? upright * copysign(real(1), x) : upright;
}
