// Where tensor_product.cuh puts each chunk of a strip; test_precision.py looks for bank conflicts.
#include "variant.cuh"
#include PRODUCT

template <int SIZE, bool BY_K> DEVICE void write(long long* places) {
    using S = Strip<SIZE, BY_K>;
    for (int i = threadIdx.x; i < S::ROWS * S::CHUNKS; i += 32) places[i] = S::place(i / S::CHUNKS, i % S::CHUNKS);
}

extern "C" __global__ void strip_places(long long* places, long long size, long long by_k) {
    if (size == 64) by_k ? write<64, true>(places) : write<64, false>(places);
    if (size == 128) by_k ? write<128, true>(places) : write<128, false>(places);
    if (size == 256) by_k ? write<256, true>(places) : write<256, false>(places);
}
