// What the instructions of include/ptx.cuh do, as late as the program allows.
#include "async.hpp"

namespace host {

namespace {

std::vector<Work> bulk_copies;

// Where byte `address` lies under the 128-byte swizzle: bits 4-6 are crossed with bits 7-9.
uintptr_t swizzled(uintptr_t address) { return address ^ (address >> 7 & 7) << 4; }

// A plain-text tensor map: the fields that cuTensorMapEncodeTiled takes, for two dimensions.
struct Map {
    unsigned char* base;
    long long columns, rows, row_bytes;
    int box_columns, box_rows, element_bytes, swizzle;
    // Each element of the box at (x, y): where it lies in shared memory, and in the tensor or null.
    template <class F> void each(uintptr_t box, int x, int y, F f) const {
        for (int r = 0; r < box_rows; ++r) {
            for (int c = 0; c < box_columns; ++c) {
                const uintptr_t at = box + (static_cast<uintptr_t>(r) * box_columns + c) * element_bytes;
                const bool inside = x + c >= 0 && x + c < columns && y + r >= 0 && y + r < rows;
                f(swizzle ? swizzled(at) : at,
                  inside ? base + (y + r) * row_bytes + (x + c) * element_bytes : nullptr);
            }
        }
    }
};

struct Barrier {  // the 8 bytes of an mbarrier
    int pending : 12, arrivals : 12;
    unsigned phase : 8;
    int bytes;  // still expected
};
static_assert(sizeof(Barrier) == 8, "");

Barrier& barrier_at(uintptr_t address) { return *reinterpret_cast<Barrier*>(address); }

void end_phase(Barrier& b) {
    if (b.pending || b.bytes) return;
    b.phase ^= 1;
    b.pending = b.arrivals;
}

// Element (i, k), of so many bytes, of an operand of wgmma: K along rows of 128 bytes, or down them.
unsigned element_128(uintptr_t base, unsigned i, unsigned k, bool by_k, unsigned bytes) {
    const unsigned row = by_k ? k : i, column = by_k ? i % 64 : k;
    const uintptr_t box = by_k ? i / 64 * 8192 : 0;
    unsigned bits = 0;
    memcpy(&bits, reinterpret_cast<const void*>(swizzled(base + box + row * 128 + column * bytes)), bytes);
    return bits;
}

}  // namespace

bool bulk_copies_pending() { return !bulk_copies.empty(); }

void finish_bulk_copy(uint64_t which) {
    const size_t i = which % bulk_copies.size();
    const Work work = std::move(bulk_copies[i]);
    bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(i));
    work();
}

void drop_bulk_copies() { bulk_copies.clear(); }

void aligned(uintptr_t address, unsigned bytes, const char* what, int line) {
    char text[64];
    if (address % bytes == 0) return;
    snprintf(text, sizeof text, "%s: address not on %u bytes", what, bytes);
    fail(text, line);
}

void copy_later(uintptr_t to, const void* from, unsigned bytes, unsigned valid, int line) {
    aligned(to, bytes, "cp.async to", line);
    aligned(reinterpret_cast<uintptr_t>(from), bytes, "cp.async from", line);
    if (valid > bytes) fail("cp.async: more valid bytes than bytes", line);
    self().copies.open.push_back([=] {
        memset(reinterpret_cast<void*>(to), 0, bytes);
        if (valid) memcpy(reinterpret_cast<void*>(to), from, valid);
    });
}

void commit_copies() { self().copies.commit(); }
void wait_copies(size_t pending) { self().copies.wait(pending); }

void barrier_init(uintptr_t barrier, unsigned arrivals, int line) {
    aligned(barrier, 8, "mbarrier", line);
    barrier_at(barrier) = {static_cast<int>(arrivals), static_cast<int>(arrivals), 0, 0};
}

void barrier_arrive_remote(uintptr_t barrier, int line) {
    expect_reachable(barrier, line);
    barrier_arrive(barrier, 0, line);
}

void barrier_arrive(uintptr_t barrier, unsigned bytes, int line) {
    Barrier& b = barrier_at(barrier);
    if (b.pending <= 0) fail("mbarrier: more arrivals than it counts", line);
    b.bytes += static_cast<int>(bytes);
    --b.pending;
    end_phase(b);
}

bool barrier_passed(uintptr_t barrier, unsigned parity) { return barrier_at(barrier).phase != (parity & 1); }

void load_box_later(uintptr_t to, const void* map, uintptr_t barrier, int x, int y, int line) {
    const Map m = *static_cast<const Map*>(map);
    aligned(reinterpret_cast<uintptr_t>(map), 64, "tensor map", line);
    aligned(to, m.swizzle ? 1024 : 128, "TMA to", line);
    expect_reachable(to, line);
    expect_reachable(barrier, line);
    bulk_copies.push_back([=] {
        expect_alive(to, line);
        m.each(to, x, y, [&](uintptr_t here, unsigned char* there) {
            if (there) {
                memcpy(reinterpret_cast<void*>(here), there, m.element_bytes);
            } else {
                memset(reinterpret_cast<void*>(here), 0, m.element_bytes);
            }
        });
        Barrier& b = barrier_at(barrier);
        b.bytes -= m.box_rows * m.box_columns * m.element_bytes;
        end_phase(b);
    });
}

void store_box_later(const void* map, uintptr_t from, int x, int y, int line) {
    const Map m = *static_cast<const Map*>(map);
    aligned(reinterpret_cast<uintptr_t>(map), 64, "tensor map", line);
    aligned(from, m.swizzle ? 1024 : 128, "TMA from", line);
    Thread& thread = self();
    thread.stores.open.push_back([=, &thread] {
        std::vector<unsigned char> box;
        m.each(from, x, y, [&](uintptr_t here, unsigned char*) {
            const auto* p = reinterpret_cast<const unsigned char*>(here);
            box.insert(box.end(), p, p + m.element_bytes);
        });
        thread.landing.push_back([=] {
            const unsigned char* next = box.data();
            m.each(from, x, y, [&](uintptr_t, unsigned char* there) {
                if (there) memcpy(there, next, m.element_bytes);
                next += m.element_bytes;
            });
        });
    });
}

void commit_stores() { self().stores.commit(); }

void wait_stores(size_t pending, bool written) {
    self().stores.wait(pending);
    if (written) self().land();
}

void product_later(float* d, unsigned columns, uintptr_t a, uintptr_t b, bool a_by_k, bool b_by_k,
                   float (*value)(unsigned), int keep, unsigned bytes) {
    const unsigned depth = 32 / bytes, t = rank % GROUP, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    self().products.open.push_back([=] {
        float from_a[2][16];
        for (unsigned h = 0; h < 2; ++h)
            for (unsigned k = 0; k < depth; ++k) from_a[h][k] = value(element_128(a, row + h * 8, k, a_by_k, bytes));
        for (unsigned j = 0; j < columns / 4; ++j) {
            const unsigned n = j / 2 * 8 + column + j % 2;
            float* const at = d + j / 2 * 4 + j % 2;  // row + 8 is two elements further
            float sums[2] = {keep ? at[0] : 0.0f, keep ? at[2] : 0.0f};
            for (unsigned k = 0; k < depth; ++k) {
                const float from_b = value(element_128(b, n, k, b_by_k, bytes));
                sums[0] += from_a[0][k] * from_b;
                sums[1] += from_a[1][k] * from_b;
            }
            at[0] = sums[0];
            at[2] = sums[1];
        }
    });
}

// wgmma holds its warpgroup together.
void commit_products(int line) {
    wait(AT_GROUP_BARRIER, line);
    self().products.commit();
}

void wait_products(size_t pending, int line) {
    wait(AT_GROUP_BARRIER, line);
    self().products.wait(pending);
    wait(AT_GROUP_BARRIER, line);  // no thread overwrites what another has yet to multiply
}

unsigned short to_bf16(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

unsigned short to_finite_bf16(float x) {
    const unsigned short bits = to_bf16(x);
    return (bits & 0x7fff) == 0x7f80 ? static_cast<unsigned short>(bits - 1) : bits;
}

float from_bits(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

float from_bf16(unsigned bits) { return from_bits(bits << 16); }

float from_fp16(unsigned bits) {
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * ldexpf(static_cast<float>(fraction), -24);
    return sign * ldexpf(static_cast<float>(fraction + 1024), exponent - 25);
}

unsigned short to_fp16(float x) {
    const unsigned sign = signbit(x) ? 0x8000 : 0;
    if (x != x) return 0x7fff;
    int exponent;
    frexpf(x, &exponent);  // |x| < 2^exponent
    const float spacing = ldexpf(1.0f, exponent < -13 ? -24 : exponent - 11);
    const float rounded = nearbyintf(fabsf(x) / spacing) * spacing;
    if (rounded >= 65536.0f) return static_cast<unsigned short>(sign | 0x7c00);
    if (rounded < ldexpf(1.0f, -14)) return static_cast<unsigned short>(sign | unsigned(ldexpf(rounded, 24)));
    const unsigned digits = unsigned(ldexpf(frexpf(rounded, &exponent), 11));  // 1024 ... 2047
    return static_cast<unsigned short>(sign | unsigned(exponent + 14) << 10 | (digits & 1023));
}

unsigned to_tf32(unsigned bits) {
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fffffff;
    return (bits + 0x1000) & ~0x1fffu;
}

float from_tf32(unsigned bits) { return from_bits(bits & ~0x1fffu); }

void mma16(float* d, const unsigned* a, const unsigned* b, float (*value)(unsigned), int line) {
    struct Fragments { unsigned a[4], b[2]; };
    const auto lanes = gather(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, line);
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned from_a = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const unsigned from_b = lanes[column * 4 + k % 8 / 2].b[k / 8];
            d[i] += value(k % 2 ? from_a >> 16 : from_a & 0xffff) * value(k % 2 ? from_b >> 16 : from_b & 0xffff);
        }
    }
}

void mma_tf32(float* d, const unsigned* a, const unsigned* b, int line) {
    struct Fragments { unsigned a[4], b[2]; };
    const auto lanes = gather(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, line);
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 8; ++k) {
            const unsigned from_a = lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2];
            const unsigned from_b = lanes[column * 4 + k % 4].b[k / 4];
            d[i] += from_tf32(from_a) * from_tf32(from_b);
        }
    }
}

}  // namespace host
