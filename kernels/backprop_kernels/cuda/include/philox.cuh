// Dropout's mask: Philox4x32-10 (Salmon et al., SC'11) of seed, step, layer and element, bit for bit
// that of reference/philox.py. Element e takes word e % 4 of block e / 4.
#pragma once

struct KeepMask {
    unsigned key0 = 0, key1 = 0, step = 0, layer;
    unsigned w0 = 0, w1 = 0, w2 = 0, w3 = 0;  // the words of `block`
    long long block = -1;                     // none yet
    unsigned long long threshold;  // up to 2^32: nothing is kept then
    bool drops;                    // whether there is dropout at all
    const long long* before;       // how many rows came before those of these arrays, or null for none

    // stream: seed, step on the device; null where there is no dropout and everything is kept.
    DEVICE KeepMask(const long long* stream, const long long* before, long long layer, long long threshold)
        : layer(unsigned(layer)), threshold(threshold), drops(stream != nullptr), before(before) {
        if (!drops) return;
        const unsigned long long seed = stream[0];
        key0 = unsigned(seed);
        key1 = unsigned(seed >> 32);
        step = unsigned(stream[1]);
    }

    // Read again for each element: registers are for sums.
    DEVICE long long rows() const { return before ? *before : 0; }

    // Whether the element is kept. Cheapest where a thread asks for elements in order.
    DEVICE bool operator()(long long element) {
        if (!drops) return true;
        if (element / 4 != block) draw(element / 4);
        const unsigned low = element & 1 ? w1 : w0, high = element & 1 ? w3 : w2;
        return (element & 2 ? high : low) >= threshold;
    }

    DEVICE void draw(long long wanted) {
        block = wanted;
        w0 = unsigned(block);
        w1 = unsigned(block >> 32);
        w2 = step;
        w3 = layer;
        unsigned k0 = key0, k1 = key1;
        for (int round = 0; round < 10; ++round) {
            const unsigned long long a = w0 * 0xD2511F53ull, b = w2 * 0xCD9E8D57ull;
            w0 = unsigned(b >> 32) ^ w1 ^ k0;
            w1 = unsigned(b);
            w2 = unsigned(a >> 32) ^ w3 ^ k1;
            w3 = unsigned(a);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
    }
};
