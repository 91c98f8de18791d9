// mlp_step: loss and gradients of a whole small network.  docs/derivations.md#mlp_step
//
// X (rows, in), P (parameters), target or labels, shares or null for one `share`     read
// values (blocks): of the loss; slices (blocks, parameters): each block's gradient   written
// G (parameters): the sum of the slices, in order; untouched where no layer lies     written
// Fused: every layer forward and backward, the loss, the bias gradients.
//
// A block takes rows_per_block rows, TILE at a time; the next ones are on their way during backward.
// Weights are rounded into shared memory once; a tile's activations lie there too, each one's delta
// takes its place, and what a block adds up stays in registers or, as many to a thread, in shared
// memory. Any width is filled up with zeros to a multiple of 16. Every sum over rows goes on from 16
// rows to the next, so that its bits depend on the number of blocks alone. variant.cuh gives
// Layer<0> ... Layer<LAYERS - 1>: sizes, place in P (BIAS < 0: none), places in shared memory in
// bytes (SUMS_AT < 0: in registers).
#include "variant.cuh"
#include "floats.cuh"
#include "reduce.cuh"
#include LOSS

constexpr int WARPS = THREADS / WARP, LAST = LAYERS - 1;
constexpr int DOWN = TILE / 16, ACROSS = WARPS / DOWN;  // warps that share a tile of rows
constexpr int Z_STRIDE = Layer<LAST>::OUT | 1;          // odd: rows lie in different banks

constexpr int pieces(int width) { return (width + 15) / 16; }  // of 16

template <class T> DEVICE T* shared_at(int byte) {
    DYNAMIC_SHARED(memory);
    return reinterpret_cast<T*>(memory + byte);
}

DEVICE int lane() { return threadIdx.x % WARP; }
DEVICE int warp() { return threadIdx.x / WARP; }
DEVICE u32 pair(float left, float right) { return u32(bf16(left).bits) | u32(bf16(right).bits) << 16; }

// A matrix of bf16 in shared memory. A row takes 16 bytes more than its pieces, an odd number of
// such chunks: no two of eight neighbours meet in a bank.
template <int AT, int WIDTH> struct Matrix {
    static constexpr int STRIDE = pieces(WIDTH) * 16 + 8;

    static DEVICE bf16* at(int row, int column) { return shared_at<bf16>(AT) + row * STRIDE + column; }
    static DEVICE u32& two(int row, int column) { return *reinterpret_cast<u32*>(at(row, column)); }

    // 16 x 16 elements as an operand of mma: from `first` on along M or N, from `k` on along K, which
    // runs along the rows, or with BY_K down the columns.
    template <bool OF_B, bool BY_K> static DEVICE void fragment(u32 (&r)[4], int first, int k) {
        const int matrix = lane() / 8, one = matrix % 2 * 8, other = matrix / 2 * 8;
        const int m = first + (OF_B ? other : one), at_k = k + (OF_B ? one : other);
        if constexpr (BY_K)
            ldmatrix_x4_transposed(r, shared_address(at(at_k + lane() % 8, m)));
        else
            ldmatrix_x4(r, shared_address(at(m + lane() % 8, at_k)));
    }
};

template <int L> using Weights = Matrix<Layer<L>::WEIGHTS_AT, Layer<L>::IN>;
template <int L> using Input = Matrix<Layer<L>::INPUT_AT, Layer<L>::IN>;
template <int L> using Output = Matrix<Layer<L>::OUTPUT_AT, Layer<L>::OUT>;  // later its delta
template <int L> using Kept = Matrix<Layer<L>::KEPT_AT, Layer<L>::OUT>;      // Z, where that is saved

// c += A B of 16 x 16, as two halves side by side.
DEVICE void multiply_add(float (&left)[4], float (&right)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    const u32 b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
    mma_bf16(left, a, b_left);
    mma_bf16(right, a, b_right);
}

// f(row, column, x, y) for the neighbours x, y that this lane holds of 16 x 16 sums at (row, column).
template <class F>
DEVICE void each_pair(const float (&left)[4], const float (&right)[4], int row, int column, F f) {
    const int r = row + lane() / 4, c = column + lane() % 4 * 2;
    f(r, c, left[0], left[1]);
    f(r + 8, c, left[2], left[3]);
    f(r, c + 8, right[0], right[1]);
    f(r + 8, c + 8, right[2], right[3]);
}

// The warp's 16 rows of A (TILE, K) times B, piece by piece of N; f as in each_pair.
template <class A, class B, bool BY_K, int K, int N, class F> DEVICE void multiply(F f) {
    const int row = warp() % DOWN * 16;
    u32 a[pieces(K)][4];
#pragma unroll
    for (int k = 0; k < pieces(K); ++k) A::template fragment<false, false>(a[k], row, k * 16);
#pragma unroll 1
    for (int n = warp() / DOWN; n < pieces(N); n += ACROSS) {
        float left[4] = {}, right[4] = {};
#pragma unroll
        for (int k = 0; k < pieces(K); ++k) {
            u32 b[4];
            B::template fragment<true, BY_K>(b, n * 16, k * 16);
            multiply_add(left, right, a[k], b);
        }
        each_pair(left, right, row, n * 16, f);
    }
}

// ---- what a block keeps: weights, and the sums of its gradients

template <int L> DEVICE void load_weights(const real* P) {
    using Of = Layer<L>;
    constexpr int WIDTH = pieces(Of::IN) * 16, HEIGHT = pieces(Of::OUT) * 16;
    for (int e = threadIdx.x; e < HEIGHT * WIDTH; e += THREADS) {
        const int o = e / WIDTH, i = e % WIDTH;
        const bool there = o < Of::OUT && i < Of::IN;
        *Weights<L>::at(o, i) = bf16(there ? P[Of::WEIGHT + o * Of::IN + i] : 0.0f);
    }
    for (int o = threadIdx.x; o < HEIGHT; o += THREADS)
        shared_at<float>(Of::BIAS_AT)[o] = Of::BIAS >= 0 && o < Of::OUT ? P[Of::BIAS + o] : 0.0f;
    if constexpr (L < LAST) load_weights<L + 1>(P);
}

// The pieces of dW of one layer that a warp adds up, HIGH x WIDE of them; the first warp across adds
// up db, by a product with ones. Sums kept in shared memory are there one row of pieces at a time.
template <int L> struct Share {
    static constexpr bool IN_REGISTERS = Layer<L>::SUMS_AT < 0;
    static constexpr int WARPS_DOWN = Layer<L>::WARPS_DOWN, WARPS_ACROSS = WARPS / WARPS_DOWN;
    static constexpr int ALL_DOWN = pieces(Layer<L>::OUT), ALL_ACROSS = pieces(Layer<L>::IN);
    static constexpr int HIGH = (ALL_DOWN + WARPS_DOWN - 1) / WARPS_DOWN;
    static constexpr int WIDE = (ALL_ACROSS + WARPS_ACROSS - 1) / WARPS_ACROSS;
    static constexpr int STEP = IN_REGISTERS ? HIGH : 1;  // rows of pieces at a time
    static constexpr int ROW = 2 * WIDE + 1;              // fours of sums a thread has of one, the last of db
    using Some = float[STEP * ROW][4];

    static DEVICE int row(int i) { return (warp() % WARPS_DOWN * HIGH + i) * 16; }
    static DEVICE int column(int j) { return (warp() / WARPS_DOWN * WIDE + j) * 16; }
    static DEVICE bool has_row(int i) { return HIGH * WARPS_DOWN == ALL_DOWN || row(i) < ALL_DOWN * 16; }
    static DEVICE bool has_column(int j) {
        return WIDE * WARPS_ACROSS == ALL_ACROSS || column(j) < ALL_ACROSS * 16;
    }
    static DEVICE bool has_bias() { return Layer<L>::BIAS >= 0 && warp() / WARPS_DOWN == 0; }
};

// Of layer L and all above it.
template <int L> struct Sums : Sums<L + 1> {
    float at[Share<L>::IN_REGISTERS ? Share<L>::STEP * Share<L>::ROW : 1][4];
};
template <> struct Sums<LAYERS> {};

// f(i, sums) with the sums of the rows of pieces from i on, in registers.
template <int L, class F> DEVICE void with_sums(Sums<L>& sums, F f) {
    using Mine = Share<L>;
    if constexpr (Mine::IN_REGISTERS) {
        f(0, sums.at);
    } else {
        float4* kept = shared_at<float4>(Layer<L>::SUMS_AT) + threadIdx.x;
#pragma unroll 1
        for (int i = 0; i < Mine::HIGH; ++i, kept += Mine::ROW * THREADS) {
            typename Mine::Some here;
#pragma unroll
            for (int k = 0; k < Mine::ROW; ++k) {
                const float4 four = kept[k * THREADS];
                here[k][0] = four.x, here[k][1] = four.y, here[k][2] = four.z, here[k][3] = four.w;
            }
            f(i, here);
#pragma unroll
            for (int k = 0; k < Mine::ROW; ++k) kept[k * THREADS] = {here[k][0], here[k][1], here[k][2], here[k][3]};
        }
    }
}

template <int L> DEVICE void clear(Sums<L>& sums) {
    using Mine = Share<L>;
    if constexpr (Mine::IN_REGISTERS) {
#pragma unroll
        for (int k = 0; k < Mine::STEP * Mine::ROW; ++k)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums.at[k][e] = 0.0f;
    } else {
        for (int k = 0; k < Mine::HIGH * Mine::ROW; ++k)
            shared_at<float4>(Layer<L>::SUMS_AT)[k * THREADS + threadIdx.x] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    if constexpr (L < LAST) clear<L + 1>(sums);
}

template <int L> DEVICE void store(Sums<L>& sums, real* slice) {
    using Of = Layer<L>;
    using Mine = Share<L>;
    with_sums<L>(sums, [&](int i0, typename Mine::Some& at) {
#pragma unroll
        for (int i = 0; i < Mine::STEP; ++i) {
#pragma unroll
            for (int j = 0; j < Mine::WIDE; ++j) {
                const int k = i * Mine::ROW + 2 * j;
                each_pair(at[k], at[k + 1], Mine::row(i0 + i), Mine::column(j), [&](int o, int c, float x, float y) {
                    if (o >= Of::OUT) return;
                    real* row = slice + Of::WEIGHT + o * Of::IN;
                    if (c < Of::IN) row[c] = x;
                    if (c + 1 < Of::IN) row[c + 1] = y;
                });
            }
            if (!Mine::has_bias() || lane() % 4) continue;
            const int o = Mine::row(i0 + i) + lane() / 4, k = (i + 1) * Mine::ROW - 1;
            if (o < Of::OUT) slice[Of::BIAS + o] = at[k][0];
            if (o + 8 < Of::OUT) slice[Of::BIAS + o + 8] = at[k][2];
        }
    });
    if constexpr (L < LAST) store<L + 1>(sums, slice);
}

// ---- a tile of rows, of which the first `rows` are there

// Let the rows of a tile be copied to shared memory as they are, where there is room for them.
DEVICE void fetch_rows(const real* X, int rows) {
    if (AHEAD_AT < 0) return;
    float* to = shared_at<float>(AHEAD_AT);
    const int count = rows * Layer<0>::IN;
    if (reinterpret_cast<size_t>(X) % 16 == 0) {
        for (int e = threadIdx.x * 4; e < count; e += THREADS * 4)
            copy_async_16(shared_address(to + e), X + e, min(count - e, 4) * 4);
    } else {
        for (int e = threadIdx.x; e < count; e += THREADS) copy_async_4(shared_address(to + e), X + e, 4);
    }
    copy_async_commit();
}

DEVICE void load_rows(const real* X, int rows) {
    constexpr int IN = Layer<0>::IN, WIDTH = pieces(IN) * 16;
    const float* from = X;
    if constexpr (AHEAD_AT >= 0) {
        copy_async_wait<0>();
        __syncthreads();  // the copies of all threads are there
        from = shared_at<float>(AHEAD_AT);
    }
    for (int e = threadIdx.x; e < TILE * WIDTH; e += THREADS) {
        const int r = e / WIDTH, i = e % WIDTH;
        *Input<0>::at(r, i) = bf16(r < rows && i < IN ? from[r * IN + i] : 0.0f);
    }
}

// Every Y, Z of the last layer. What is not there is 0 and stays so, whatever act(0) is.
template <int L> DEVICE void forward(int rows) {
    using Of = Layer<L>;
    using Act = typename Of::Act;
    __syncthreads();  // the input is complete
    const float* bias = shared_at<float>(Of::BIAS_AT);
    multiply<Input<L>, Weights<L>, false, Of::IN, Of::OUT>([&](int row, int column, float x, float y) {
        const float z0 = x + bias[column], z1 = y + bias[column + 1];
        if constexpr (L == LAST) {
            float* z = shared_at<float>(Z_AT) + row * Z_STRIDE;
            if (column < Of::OUT) z[column] = z0;
            if (column + 1 < Of::OUT) z[column + 1] = z1;
        } else {
            const bool first = row < rows && column < Of::OUT, second = row < rows && column + 1 < Of::OUT;
            Output<L>::two(row, column) = pair(first ? Act::activation(z0) : 0.0f, second ? Act::activation(z1) : 0.0f);
            if constexpr (Act::SAVES == 2) Kept<L>::two(row, column) = pair(first ? z0 : 0.0f, second ? z1 : 0.0f);
        }
    });
    if constexpr (L < LAST) forward<L + 1>(rows);
}

// Deltas of the last layer, from its Z; this thread's part of the loss. `first` is the tile's first row.
DEVICE double last_deltas(const Aim& aim, const real* shares, real share, long long first, int rows) {
    constexpr int OUT = Layer<LAST>::OUT;
    double sum = 0;
    for (int r0 = 0; r0 < TILE; r0 += THREADS / LANES) {
        const int r = r0 + threadIdx.x / LANES, mine = threadIdx.x % LANES;
        const bool here = r < rows;
        const int at = here ? r : 0;  // all lanes take part
        const real* z = shared_at<float>(Z_AT) + at * Z_STRIDE;
        real* d = shared_at<float>(D_AT) + at * Z_STRIDE;
        sum += loss_row(z, aim, first + at, here, shares ? shares[first + at] : share, d, OUT, mine, LANES);
        if (r >= TILE) continue;
        for (int j = mine; j < pieces(OUT) * 16; j += LANES)  // of d each thread reads what it wrote
            *Output<LAST>::at(r, j) = bf16(here && j < OUT ? d[j] : 0.0f);
    }
    return sum;
}

// dW += dZᵀ Y_below, db += Σ_rows dZ, for the rows of pieces from i0 on.
template <int L> DEVICE void add_gradient(int i0, typename Share<L>::Some& at) {
    using Mine = Share<L>;
    constexpr u32 ONES[2] = {0x3f803f80, 0x3f803f80};
#pragma unroll 1
    for (int k = 0; k < TILE; k += 16) {
        u32 a[Mine::STEP][4] = {};
#pragma unroll
        for (int i = 0; i < Mine::STEP; ++i)
            if (Mine::has_row(i0 + i)) Output<L>::template fragment<false, true>(a[i], Mine::row(i0 + i), k);
#pragma unroll
        for (int j = 0; j < Mine::WIDE; ++j) {
            if (!Mine::has_column(j)) continue;
            u32 b[4];
            Input<L>::template fragment<true, true>(b, Mine::column(j), k);
#pragma unroll
            for (int i = 0; i < Mine::STEP; ++i) {
                const int sums = i * Mine::ROW + 2 * j;
                multiply_add(at[sums], at[sums + 1], a[i], b);
            }
        }
        if (!Mine::has_bias()) continue;
#pragma unroll
        for (int i = 0; i < Mine::STEP; ++i) mma_bf16(at[(i + 1) * Mine::ROW - 1], a[i], ONES);
    }
}

// From the top layer down: its gradient, then the deltas below, in the place of the activations.
template <int L> DEVICE void backward(Sums<0>& sums) {
    using Of = Layer<L>;
    __syncthreads();  // the deltas are complete
    with_sums<L>(sums, [](int i, typename Share<L>::Some& at) { add_gradient<L>(i, at); });
    __syncthreads();  // the activations below have been read
    if constexpr (L > 0) {
        using Act = typename Layer<L - 1>::Act;
        multiply<Output<L>, Weights<L>, true, Of::OUT, Of::IN>([](int row, int column, float x, float y) {
            u32 saved = 0;
            if constexpr (Act::SAVES == 1) saved = Output<L - 1>::two(row, column);
            if constexpr (Act::SAVES == 2) saved = Kept<L - 1>::two(row, column);
            Output<L - 1>::two(row, column) = pair(x * Act::derivative(from_bf16(saved & 0xffff)),
                                                   y * Act::derivative(from_bf16(saved >> 16)));
        });
        backward<L - 1>(sums);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
mlp_step(const real* X, const real* P, const real* target, const label_t* labels, const real* shares,
         real share, double* values, real* slices, long long rows, long long rows_per_block,
         long long parameters, real a, const real* each_a, real b, const real* each_b) {
    const long long first = blockIdx.x * rows_per_block, last = min(first + rows_per_block, rows);
    const Aim aim{target, labels, a, b, each_a, each_b};
    const auto rows_of_tile = [&](long long row) { return int(min(last - row, (long long)(TILE))); };
    fetch_rows(X + first * Layer<0>::IN, rows_of_tile(first));
    load_weights<0>(P);
    Sums<0> sums;
    clear<0>(sums);
    double loss = 0;
    for (long long row = first; row < last; row += TILE) {
        const int here = rows_of_tile(row);
        const long long next = row + TILE;
        load_rows(X + row * Layer<0>::IN, here);
        forward<0>(here);
        if (next < last) fetch_rows(X + next * Layer<0>::IN, rows_of_tile(next));
        __syncthreads();  // Z is complete
        loss += last_deltas(aim, shares, share, row, here);
        backward<LAST>(sums);
    }
    store<0>(sums, slices + blockIdx.x * parameters);
    loss = block_sum(loss);
    if (threadIdx.x == 0) values[blockIdx.x] = loss;
}

// ---- G = Σ slices

// Whether P[p] belongs to a layer.
template <int L> DEVICE bool belongs(long long p) {
    using Of = Layer<L>;
    if (p >= Of::WEIGHT && p < Of::WEIGHT + Of::OUT * Of::IN) return true;
    if (Of::BIAS >= 0 && p >= Of::BIAS && p < Of::BIAS + Of::OUT) return true;
    if constexpr (L < LAST) return belongs<L + 1>(p);
    return false;
}

extern "C" __global__ void __launch_bounds__(THREADS)
mlp_gradients(const real* slices, real* G, long long blocks, long long parameters) {
    __shared__ real s_sums[WARPS][WARP];
    const long long p = blockIdx.x * (long long)(WARP) + lane();
    const long long some = (blocks + WARPS - 1) / WARPS, first = warp() * some;
    real sum = real(0);
    if (p < parameters)
        for (long long b = first; b < min(first + some, blocks); ++b) sum += slices[b * parameters + p];
    s_sums[warp()][lane()] = sum;
    __syncthreads();
    if (warp() || p >= parameters || !belongs<0>(p)) return;
    for (int i = 1; i < WARPS; ++i) sum += s_sums[i][lane()];
    G[p] = sum;
}
