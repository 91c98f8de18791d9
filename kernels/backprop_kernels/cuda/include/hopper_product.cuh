// C = A B by tiles, on the tensor cores of Hopper (sm_90a): wgmma, fed and emptied by TMA.
//
// The functions are those of one_tile.cuh. A, B and C are row-major arrays whose rows start on 16
// bytes; sums are float32.
// Of tf32 wgmma takes what lies along K alone: A and B are then copies where they do not lie so. It cuts
// floats off, which are therefore rounded.
// The blocks stay, each taking every so-many-th tile. One thread of a block fetches strips of A and B
// into a ring of STAGES; two warpgroups multiply them. They share a tile, half of its rows each, or
// take turns at tiles (PING_PONG): one writes its tile while the other one multiplies.
// The blocks of a cluster compute tiles below one another: each fetches a part of B for all of them.
#pragma once
#include "corner.cuh"
#include "floats.cuh"

constexpr int GROUP = 128;                      // threads of a warpgroup
constexpr int BOX = 64, BOX_BYTES = 64 * 128;   // of A and B, what TMA fetches at once: 64 rows
constexpr int STRIP_K = 128 / sizeof(stored);   // of K, and what an instruction takes of it:
constexpr int STEP_BYTES = 32;
constexpr bool ALONG_K = sizeof(stored) > 2;    // whatever the operator says: it is handed copies
#ifdef TRANSPOSED
constexpr bool TWICE = true;  // Cᵀ is written as well: the copy for another product
#else
constexpr bool TWICE = false;
#endif
constexpr int OUT_ROWS = 32, OUT_COLUMNS = 32;  // of C, what it writes at once
constexpr int EACH = OUT_ROWS * 32 / GROUP;     // rows of them a warp: their reads are on their way at once

// PIECES: of 64 rows, for each warpgroup that multiplies.
template <int HEIGHT, int WIDTH, int COUNT, int BLOCKS, bool IN_TURN> struct GroupTile {
    static constexpr int PIECES = HEIGHT, N = WIDTH, STAGES = COUNT, CLUSTER = BLOCKS;
    static constexpr bool PING_PONG = IN_TURN;
    static constexpr int SHARERS = PING_PONG ? 1 : 2, ROWS = 64 * PIECES, M = SHARERS * ROWS;
    static constexpr int THREADS = 3 * GROUP, STRIP_BYTES = (M + N) * 128;
};
using Tile = GroupTile<TILE>;
struct OfCluster {  // the tiles of a cluster
    static constexpr int M = Tile::M * Tile::CLUSTER, N = Tile::N;
};

using Matrix = TensorMap;  // in boxes of BOX rows of 128 bytes
template <class T, bool WITH_COPY = TWICE> struct Target {
    TensorMap map;  // in boxes of OUT_ROWS x OUT_COLUMNS
};
template <class T> struct Target<T, true> {
    TensorMap map, transposed;  // this one in swizzled boxes
};
constexpr int CLUSTER = Tile::CLUSTER, SUMMED_ROWS = Tile::ROWS, WRITERS = GROUP;
constexpr bool RESIDENT = true;  // blocks wait for one another
#define BY_TILES __cluster_dims__(Tile::CLUSTER, 1, 1) __launch_bounds__(Tile::THREADS, 1)

struct Sums {
    float at[Tile::PIECES][Tile::N / 2];  // as wgmma gives them
};

// Shared memory: the ring, what each multiplying warpgroup needs to write, barriers.
constexpr int STRIDE = OUT_COLUMNS + 4;  // of staged rows: 8 of them start in different banks
constexpr int STAGED_BYTES = BOX * STRIDE * 4, OUT_BYTES = 2 * OUT_ROWS * OUT_COLUMNS * 4;
constexpr int WRITE_BYTES = STAGED_BYTES + OUT_BYTES, RING_BYTES = Tile::STAGES * Tile::STRIP_BYTES;
static_assert(WRITE_BYTES % 1024 == 0 && RING_BYTES % 1024 == 0, "a swizzled box lies on 1024 bytes");

// The strips that this warpgroup has seen, of all that went or go through the ring.
struct Ring {
    u32 strip = 0;
    shared_t base;
    DEVICE u32 stage() const { return strip % Tile::STAGES; }
    DEVICE u32 parity() const { return strip / Tile::STAGES & 1; }  // of how often it has been round
    DEVICE shared_t A() const { return base + stage() * Tile::STRIP_BYTES; }
    DEVICE shared_t B() const { return A() + Tile::M * 128; }
    DEVICE shared_t barrier(u32 i) const { return base + RING_BYTES + 2 * WRITE_BYTES + i * 8; }
    DEVICE shared_t full() const { return barrier(stage()); }
    DEVICE shared_t free() const { return barrier(Tile::STAGES + stage()); }
    DEVICE shared_t turn(int group) const { return barrier(2 * Tile::STAGES + group - 1); }
    // This warp has read the strip: all blocks that write into it may know.
    DEVICE void release() const {
        if (threadIdx.x % 32) return;
        if constexpr (Tile::CLUSTER == 1)
            barrier_arrive(free());
        else
            for (int block = 0; block < Tile::CLUSTER; ++block) barrier_arrive_remote(in_cluster(free(), block));
    }
};

// The pieces of work of this block, in order: a tile and a run of K each. Sizes are below 2^31, as TMA
// counts.
struct Work {
    int M, N, K, length;
    u32 runs, item, end;
    template <class Runs> DEVICE Work(long long m, long long n, long long k, const Runs& cut)
        : M(int(m)), N(int(n)), K(int(k)), length(int(k)), runs(1) {
        if constexpr (!same_type<Runs, Uncut>) {
            length = int(cut.length);
            runs = (u32(K) + length - 1) / u32(length);
        }
        end = (u32(N) + OfCluster::N - 1) / OfCluster::N * ((u32(M) + OfCluster::M - 1) / OfCluster::M) * runs;
        item = blockIdx.x / Tile::CLUSTER;
    }
    DEVICE void next() { item += gridDim.x / Tile::CLUSTER; }
    DEVICE u32 run() const { return item % runs; }
    DEVICE int begin() const { return int(run()) * length; }
    DEVICE int stop() const { return int(min(u32(begin()) + length, u32(K))); }
    DEVICE int strips() const { return (stop() - begin() + STRIP_K - 1) / STRIP_K; }
    DEVICE Corner at() const {
        Corner first = corner<OfCluster>(item / runs, M, N);
        first.m += blockIdx.x % Tile::CLUSTER * Tile::M;
        return first;
    }
};

template <bool A_BY_K, bool B_BY_K> static DEVICE void fetch(const Matrix& A, const Matrix& B, Ring ring, Work work) {
    for (; work.item < work.end; work.next()) {
        const Corner at = work.at();
        const int strips = work.strips();
        for (int i = 0, k = work.begin(); i < strips; ++i, k += STRIP_K, ++ring.strip) {
            barrier_wait(ring.free(), ring.parity() ^ 1);
            barrier_expect(ring.full(), Tile::STRIP_BYTES);
            for (int box = 0; box < Tile::M / BOX; ++box) {
                const int m = int(at.m) + box * BOX;
                load_box(ring.A() + box * BOX_BYTES, &A, ring.full(), A_BY_K ? m : k, A_BY_K ? k : m);
            }
            for (int box = 0; box < Tile::N / BOX; ++box) {
                const int n = int(at.n) + box * BOX, x = B_BY_K ? n : k, y = B_BY_K ? k : n;
                const shared_t to = ring.B() + box * BOX_BYTES;
                if constexpr (Tile::CLUSTER == 1)
                    load_box(to, &B, ring.full(), x, y);
                else if (box % Tile::CLUSTER == int(cluster_rank()))
                    load_box_multicast(to, &B, ring.full(), x, y, (1 << Tile::CLUSTER) - 1);
            }
        }
    }
}

// The 64 rows of an operand at `box`, from the K on that so many steps have taken.
template <bool BY_K> static DEVICE u64 described(shared_t box, int step) {
    return BY_K ? columns_of_128(box + step * 2048) : rows_of_128(box + step * STEP_BYTES);
}

// This warpgroup's sums of one piece of work; where they have `begun`, it is added to them. A strip is given
// back once the next one's products run; before the last one's have, `all_run()`.
template <bool A_BY_K, bool B_BY_K, class AllRun>
static DEVICE void multiply(Ring& ring, bool begun, int strips, int first_box, Sums& sums, AllRun all_run) {
#pragma unroll 1
    for (int i = 0; i < strips; ++i, ++ring.strip) {
        barrier_wait(ring.full(), ring.parity());
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < 128 / STEP_BYTES; ++step)
#pragma unroll
            for (int p = 0; p < Tile::PIECES; ++p)
                operand::template multiply_group<A_BY_K, B_BY_K>(
                    sums.at[p], described<A_BY_K>(ring.A() + (first_box + p) * BOX_BYTES, step),
                    described<B_BY_K>(ring.B(), step), begun || i > 0 || step > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (i > 0) Ring{ring.strip - 1, ring.base}.release();
    }
    all_run();
    wgmma_wait<0>();
    Ring{ring.strip - 1, ring.base}.release();
}

// What C (M, N) holds where this thread's sums of the rows from at.m on belong becomes them, or is added.
template <bool ADD> static DEVICE void take_earlier(Sums& sums, const real* C, Corner at, int M, int N) {
    const int thread = threadIdx.x % GROUP;
    const long long m = at.m + thread / 32 * 16 + thread % 32 / 4, n = at.n + thread % 4 * 2;
    const int below = M - int(m), right = N - int(n);
#pragma unroll
    for (int p = 0; p < Tile::PIECES; ++p)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int down = p * BOX + half * 8;
            const real* row = C + (m + down) * N + n;
#pragma unroll
            for (int j = 0; j < Tile::N / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    if (down < below && j * 8 + e < right) {
                        real& sum = sums.at[p][j * 4 + half * 2 + e];
                        sum = ADD ? row[j * 8 + e] + sum : row[j * 8 + e];
                    }
        }
}

// The runs of K of one tile in order: each adds to what those before it left; true for the last one.
template <class Runs>
static DEVICE bool complete(const Work& work, const Runs& cut, int part, int group, Corner at, Sums& sums) {
    const bool first = threadIdx.x % GROUP == 0, last = work.run() + 1 == work.runs;
    const long long tile = work.item / work.runs * Tile::CLUSTER + blockIdx.x % Tile::CLUSTER;
    const long long place = tile * Tile::SHARERS + part;
    u32* turn = cut.turns + place;
    real* left = cut.unfinished + place * Tile::ROWS * Tile::N + threadIdx.x % GROUP;
    if constexpr (Runs::START == ADDED)
        if (work.run() == 0 && cut.goes_on()) take_earlier<true>(sums, cut.earlier, at, work.M, work.N);
    if (work.runs == 1) return true;
    if (first) wait_turn(turn, work.run());
    group_sync(group);
#pragma unroll
    for (int p = 0; p < Tile::PIECES; ++p)
#pragma unroll
        for (int i = 0; i < Tile::N / 2; ++i) {
            real& there = left[(p * Tile::N / 2 + i) * GROUP];
            if (work.run() > 0) sums.at[p][i] = there + sums.at[p][i];
            if (!last) there = sums.at[p][i];
        }
    group_sync(group);
    if (first) pass_turn(turn, last ? 0 : work.run() + 1);  // 0 for the next launch
    return last;
}

template <bool A_DOWN_K, bool B_DOWN_K, class Runs, class Finish>
static DEVICE void for_each_tile(const Matrix& A, const Matrix& B, long long M, long long N, long long K,
                                 Runs runs, Finish finish) {
    constexpr bool A_BY_K = A_DOWN_K && !ALONG_K, B_BY_K = B_DOWN_K && !ALONG_K;
    DYNAMIC_SHARED(shared);
    Ring ring;
    ring.base = shared_address(shared);
    Work work(M, N, K, runs);
    const int group = threadIdx.x / GROUP;
    if (threadIdx.x == 0) {
        for (Ring r = ring; r.strip < Tile::STAGES; ++r.strip) {
            barrier_init(r.full(), 1);
            barrier_init(r.free(), 4 * Tile::SHARERS * Tile::CLUSTER);  // warps
        }
        for (int g = 1; g <= 2; ++g) barrier_init(ring.turn(g), 4);
        barrier_init_fence();
    }
    if constexpr (Tile::CLUSTER == 1) __syncthreads();
    else cluster_sync();
    if (group == 0) {
        give_registers<40>();
        if (threadIdx.x == 0) fetch<A_BY_K, B_BY_K>(A, B, ring, work);
        __syncwarp();
    } else {
        take_registers<232>();
        const int part = Tile::PING_PONG ? 0 : group - 1;  // of the tile
        for (u32 number = 0; work.item < work.end; work.next(), ++number) {
            if (Tile::PING_PONG && number % 2 != u32(group) - 1) {  // the other one's
                ring.strip += work.strips();
                continue;
            }
            // Products run in the order of the strips: none is waited for before those STAGES ahead of it.
            if (Tile::PING_PONG) barrier_wait(ring.turn(group), (number / 2 & 1) ^ (group == 1));
            Sums sums;
            const auto corner = [&] {
                Corner at = work.at();
                at.m += part * Tile::ROWS;
                return at;
            };
            bool begun = false;
            if constexpr (Runs::START == CHAINED)
                if ((begun = runs.goes_on())) take_earlier<false>(sums, runs.earlier, corner(), work.M, work.N);
            multiply<A_BY_K, B_BY_K>(ring, begun, work.strips(), part * Tile::PIECES, sums, [&] {
                if (Tile::PING_PONG && threadIdx.x % 32 == 0) barrier_arrive(ring.turn(3 - group));
            });
            const Corner at = corner();
            if constexpr (!same_type<Runs, Uncut>)
                if (!complete(work, runs, part, group, at, sums)) continue;
            if (at.m < M) finish(at, sums);
        }
        if (threadIdx.x % GROUP == 0) store_box_wait_read<0>();
        __syncwarp();
    }
    if constexpr (Tile::CLUSTER > 1) cluster_sync();  // others may still write into this block's barriers
}

// What this lane has written of its column of C becomes a part of a row of Cᵀ, whose chunks of 16 bytes
// are crossed as TMA reads them: so eight lanes meet in no bank.
static DEVICE void turn_column(const tf32* column, unsigned char* row, int warp, int lane) {
    struct alignas(16) Chunk {
        u32 at[4];
    };
    __syncwarp();  // read again from here on: registers are for the elements
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        const int first = warp * EACH + i;
        Chunk chunk;
#pragma unroll
        for (int k = 0; k < 4; ++k) chunk.at[k] = as_bits(column[(first + k) * OUT_COLUMNS]);
        *reinterpret_cast<Chunk*>(row + (first / 4 ^ lane % 8) * 16) = chunk;
    }
}

// As in one_tile.cuh, for this warpgroup's rows. The sums of OUT_COLUMNS columns of a piece at a time go
// by shared memory, even columns of eight before odd ones, as stmatrix has it; so does the result, and
// from there to C while more is computed.
template <class T, class Read, class Element, class Column = NoSums>
static DEVICE void write_tile(const Sums& sums, long long M, long long N, Corner at, const Target<T>& C, Read read,
                              Element element, Column column = {}) {
    constexpr int OUT = OUT_ROWS * OUT_COLUMNS;
    constexpr int OUTS = OUT_BYTES / (OUT * sizeof(T)) / (TWICE ? 2 : 1);  // boxes of C that take turns
    DYNAMIC_SHARED(shared);
    const int thread = threadIdx.x % GROUP, warp = thread / 32, lane = thread % 32, group = threadIdx.x / GROUP;
    unsigned char* own = shared + RING_BYTES + (group - 1) * WRITE_BYTES;
    float* s_rows = reinterpret_cast<float*>(own + OUT_BYTES);
    const int matrix = lane / 8, stored_row = warp * 16 + matrix / 2 * 8 + lane % 8;
    const int place = lane / 8 * 8 + lane % 2 * 4 + lane % 8 / 2;  // of this lane's column in a row
    int turn = 0;
#pragma unroll 1
    for (int block = 0; block < Tile::N / OUT_COLUMNS; ++block) {
        const long long n = at.n + block * OUT_COLUMNS + lane;
        real total = real(0);
#pragma unroll 1
        for (int piece = 0; piece < Tile::PIECES; ++piece) {
#pragma unroll
            for (int p = 0; p < Tile::PIECES; ++p)
#pragma unroll
                for (int j = 0; j < Tile::N / 8; ++j) {
                    if (p != piece || j / 4 != block) continue;  // a register has no run-time index
                    u32 r[4];
#pragma unroll
                    for (int e = 0; e < 4; ++e) r[e] = as_bits(sums.at[p][j * 4 + e]);
                    stmatrix_x4(shared_address(s_rows + stored_row * STRIDE + (j % 4 * 2 + matrix % 2) * 4), r);
                }
#pragma unroll 1
            for (int half = 0; half < BOX; half += OUT_ROWS) {
                const long long m = at.m + piece * BOX + half;
                T* out = reinterpret_cast<T*>(own) + turn * OUT;
                unsigned char* turned = own + OUT * sizeof(T);  // what goes to Cᵀ
                if (thread == 0) store_box_wait_read<OUTS - 1>();
                group_sync(group);
                decltype(read(m, n)) read_of[EACH];
#pragma unroll
                for (int i = 0; i < EACH; ++i) read_of[i] = read(min(m + warp * EACH + i, M - 1), n);
#pragma unroll
                for (int i = 0; i < EACH; ++i) {
                    const int row = warp * EACH + i;
                    if (m + row >= M) break;
                    const real c = element(m + row, n, s_rows[(half + row) * STRIDE + place], read_of[i]);
                    out[row * OUT_COLUMNS + lane] = T(c);
                    total += c;
                }
                if constexpr (TWICE) turn_column(out + lane, turned + lane * 128, warp, lane);
                fence_shared_async();
                group_sync(group);
                if (thread == 0) {
                    store_box(&C.map, shared_address(out), int(n), int(m));
                    if constexpr (TWICE) store_box(&C.transposed, shared_address(turned), int(m), int(n));
                    store_box_commit();
                }
                turn = (turn + 1) % OUTS;
            }
        }
        if constexpr (!same_type<Column, NoSums>) {
            float* s_totals = s_rows + OUT_COLUMNS;  // where rows are padded
            s_totals[lane * STRIDE + warp] = total;
            group_sync(group);
            if (warp == 0 && n < N) {
                for (int i = 1; i < GROUP / 32; ++i) total += s_totals[lane * STRIDE + i];
                column(n, total);
            }
        }
    }
}
