// What product.cuh and tensor_product.cuh share: a block of threads computes one tile of C, of one
// slice of K where K is cut (grid y). hopper_product.cuh has the same functions.
#pragma once
#include "corner.cuh"

using Matrix = const stored*;
template <class T> using Target = T*;
constexpr int CLUSTER = 1, SUMMED_ROWS = Tile::M, WRITERS = Tile::THREADS;
constexpr bool RESIDENT = false;
#define BY_TILES __launch_bounds__(Tile::THREADS, 1)

// finish(corner, sums) for each tile of C = A B that this block computes. A is M x K, or with A_BY_K
// stored as K x M; B is stored as N x K, or with B_BY_K as K x N.
template <bool A_BY_K, bool B_BY_K, class Runs, class Finish>
static DEVICE void for_each_tile(Matrix A, Matrix B, long long M, long long N, long long K, Runs runs, Finish finish) {
    const Corner at = corner<Tile>(blockIdx.x, M, N);
    long long k0 = 0, k_end = K;
    if constexpr (!same_type<Runs, Uncut>) {
        k0 = blockIdx.y * runs.length;
        k_end = min(k0 + runs.length, K);
    }
    Sums sums;
    begin(sums, at, [&](long long m, long long n) {
        if constexpr (Runs::START == CHAINED)
            if (runs.goes_on() && m < M && n < N) return runs.earlier[m * N + n];
        return real(0);
    });
    multiply<A_BY_K, B_BY_K>(A, A_BY_K ? M : K, B, B_BY_K ? N : K, M, N, at, k0, k_end, sums);
    finish(at, sums);
}

// C(m, n) = element(m, n, sum, read(m, n)) for the tile at `at`; whole warps call both, so that n may be
// N or more. `read` reads memory and writes none, so that it can be called long before.
// Then column(n, total), by one thread, of each column's sum over the SUMMED_ROWS rows from at.m on.
// With a grid y, C is as many slices.
template <class T, class Read, class Element, class Column = NoSums>
static DEVICE void write_tile(const Sums& sums, long long M, long long N, Corner at, T* C, Read read, Element element,
                              Column column = {}) {
    T* slice = C + blockIdx.y * M * N;
    real total = real(0);
    for_each(sums, M, N, at, [&](long long m, long long n, real sum) {
        const real c = element(m, n, sum, read(m, n));
        if (n >= N) return;
        slice[m * N + n] = T(c);
        total += c;
    });
    if constexpr (!same_type<Column, NoSums>) {
        constexpr int PARTS = Tile::THREADS / Tile::N;  // threads that share a column
        __shared__ real s_totals[PARTS][Tile::N];
        const int here = threadIdx.x % Tile::N, part = threadIdx.x / Tile::N;
        s_totals[part][here] = total;
        __syncthreads();
        if (part || at.n + here >= N) return;
        for (int i = 1; i < PARTS; ++i) total += s_totals[i][here];
        column(at.n + here, total);
    }
}
