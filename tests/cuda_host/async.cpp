// The asynchronous work that include/ptx.cuh starts: copies into shared memory, and their barriers.
#include "async.hpp"

namespace host {

namespace {
std::vector<Work> bulk_copies;
}

bool bulk_copies_pending() { return !bulk_copies.empty(); }

void finish_bulk_copy(uint64_t which) {
    const size_t i = which % bulk_copies.size();
    const Work work = std::move(bulk_copies[i]);
    bulk_copies.erase(bulk_copies.begin() + static_cast<std::ptrdiff_t>(i));
    work();
}

void drop_bulk_copies() { bulk_copies.clear(); }

}  // namespace host
