// A CUDA thread as runtime.cpp keeps it, with the asynchronous work it has started.
#pragma once
#include "host.hpp"

#include <stdio.h>

#include <deque>
#include <functional>
#include <vector>

namespace host {

using Work = std::function<void()>;

// What is committed in groups and happens only when its group is waited for.
struct Groups {
    std::vector<Work> open;
    std::deque<std::vector<Work>> committed;
    void commit() {
        committed.push_back(std::move(open));
        open.clear();
    }
    void wait(size_t pending) {
        while (committed.size() > pending) {
            for (Work& work : committed.front()) work();
            committed.pop_front();
        }
    }
    bool empty() const { return open.empty() && committed.empty(); }
    void clear() {
        open.clear();
        committed.clear();
    }
};

struct Thread {
    uint3 index;
    State state;
    int line;
    void* stack;
    unsigned phase;  // of the slots for warp collectives
    Groups copies, products, stores;
    std::vector<Work> landing;  // stores that have been read
    void reset() {
        state = READY;
        phase = 0;
        copies.clear();
        products.clear();
        stores.clear();
        landing.clear();
    }
    void land() {
        for (Work& work : landing) work();
        landing.clear();
    }
};

Thread& self();
void expect_reachable(uintptr_t address, int line);  // from any block of the cluster
void expect_alive(uintptr_t address, int line);      // the block whose shared memory it is

// Bulk copies (TMA) belong to no thread: a copy engine ends them at some time, in any order.
bool bulk_copies_pending();
void finish_bulk_copy(uint64_t which);
void drop_bulk_copies();

}  // namespace host
