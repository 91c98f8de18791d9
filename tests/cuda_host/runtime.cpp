// The execution model of CUDA on one CPU core: a block, a cluster of blocks, or a whole grid of blocks
// that wait for one another, at a time; its threads as fibers.
//
// A fiber runs until it waits: at __syncthreads, at a warp or warpgroup collective, or polling an
// mbarrier. `schedule` decides who runs next: 0 in turn; odd: each warp as far ahead as it can get;
// even: at random. Blocks go forwards, backwards or at random likewise. Asynchronous copies are
// done as late as the program allows (cp.async, wgmma) or at random moments (bulk copies).
// Shared memory starts as NaN in every block. With HOST_THREADS each CUDA thread is a std::thread,
// so that ThreadSanitizer sees a missing barrier as the data race it is.
#include "async.hpp"

#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <algorithm>
#include <vector>
#ifdef HOST_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#endif

namespace host {

HOST_LOCAL Thread* current;
HOST_LOCAL uint3 thread_index;
HOST_LOCAL unsigned rank;
uint3 block_index, block_size, grid_size;
extern "C" { uint64_t host_ends = 0; }  // how many blocks of each end of a grid run; 0: all

namespace {

constexpr size_t STACK = 64 << 10, PAGE = 4096;
constexpr unsigned MOST_THREADS = 1024, MOST_BLOCKS = 8;  // of a block, at the same time
constexpr int SECONDS = 120;  // of CPU time, after which a kernel counts as stuck

// Of all blocks that run at the same time, one after the other. Static shared memory is at one address
// for all: that of the block that runs; the others' is kept aside.
std::vector<Thread> threads;
unsigned block_threads, cluster_blocks, group_blocks;
std::vector<unsigned char> dynamic_memory;
unsigned char* dynamic_start;
size_t dynamic_stride;
alignas(64) unsigned char slots[2][MOST_BLOCKS * MOST_THREADS / WARP][WARP][SLOT];
Body kernel_body;
void** kernel_arguments;
char message[512];
jmp_buf escape;
uint64_t random_state;

uint64_t next_random() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

template <class T> void shuffle(std::vector<T>& order) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

void poison(unsigned char* shared, unsigned char* shared_end) {
    if (shared != shared_end) memset(shared, 0xff, shared_end - shared);
    memset(dynamic_start, 0xff, group_blocks * dynamic_stride);
}

unsigned number_of(const Thread& thread) { return static_cast<unsigned>(&thread - threads.data()); }

uint3 place_in_grid(uint64_t block) {
    return {unsigned(block % grid_size.x), unsigned(block / grid_size.x % grid_size.y),
            unsigned(block / grid_size.x / grid_size.y)};
}

unsigned block_in_group() { return number_of(*current) / block_threads; }

}  // namespace

unsigned cluster_rank() { return block_in_group() % cluster_blocks; }

unsigned char* dynamic_shared() { return dynamic_start + block_in_group() * dynamic_stride; }

uintptr_t in_cluster(uintptr_t address, unsigned to, int line) {
    if (to >= cluster_blocks) fail("a rank beyond the cluster", line);
    expect_reachable(address, line);
    return address + to * dynamic_stride - cluster_rank() * dynamic_stride;
}

void expect_reachable(uintptr_t address, int line) {
    if (cluster_blocks == 1) return;
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(dynamic_start);
    const uintptr_t first = (block_in_group() - cluster_rank()) * dynamic_stride;
    if (offset - first >= cluster_blocks * dynamic_stride)
        fail("a cluster reaches the emulator's dynamic shared memory only", line);
    expect_alive(address, line);
}

void expect_alive(uintptr_t address, int line) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(dynamic_start);
    if (offset >= group_blocks * dynamic_stride) return;  // static: the own block's
    const auto first = threads.begin() + static_cast<std::ptrdiff_t>(offset / dynamic_stride * block_threads);
    if (std::all_of(first, first + block_threads, [](const Thread& t) { return t.state == DONE; }))
        fail("shared memory of a block that has ended", line);
}

Thread& self() { return *current; }

void fail(const char* what, int line) {
    snprintf(message, sizeof message, "%s, line %d, thread %u of block (%u, %u, %u)", what, line,
             rank, block_index.x, block_index.y, block_index.z);
    longjmp(escape, 1);
}

unsigned char* deposit(const void* value, unsigned bytes, int line) {
    const unsigned phase = current->phase++ & 1;  // two sets: a fast lane may be one ahead
    const unsigned warp = number_of(*current) / WARP;
    memcpy(slots[phase][warp][rank % WARP], value, bytes);
    wait(AT_WARP_BARRIER, line);
    return slots[phase][warp][0];
}

#ifdef HOST_THREADS

namespace {

struct Barrier {
    std::mutex mutex;
    std::condition_variable changed;
    unsigned expected = 0, arrived = 0, generation = 0;
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        const unsigned mine = generation;
        if (++arrived == expected) {
            arrived = 0;
            ++generation;
            changed.notify_all();
        } else {
            changed.wait(lock, [&] { return generation != mine; });
        }
    }
};
Barrier block_barrier, warp_barrier[MOST_THREADS / WARP];

}  // namespace

void wait(State barrier, int line) {
    if (barrier == AT_BLOCK_BARRIER) {
        block_barrier.wait();
    } else if (barrier == AT_WARP_BARRIER) {
        warp_barrier[rank / WARP].wait();
    } else {
        fprintf(stderr, "line %d: warpgroups, clusters and mbarriers need fibers\n", line);
        abort();
    }
}

namespace {

int run_blocks(unsigned char* shared, unsigned char* shared_end, uint64_t) {
    const unsigned count = threads.size();
    block_barrier.expected = count;
    for (unsigned w = 0; w < count / WARP; ++w) warp_barrier[w].expected = WARP;
    std::vector<std::thread> crew;
    for (unsigned i = 0; i < count; ++i) {
        crew.emplace_back([=] {
            current = &threads[i];
            thread_index = threads[i].index;
            rank = i;
            const uint64_t blocks = uint64_t(grid_size.x) * grid_size.y * grid_size.z;
            for (uint64_t b = 0; b < blocks; ++b) {
                block_barrier.wait();
                if (i == 0) {
                    block_index = place_in_grid(b);
                    poison(shared, shared_end);
                }
                block_barrier.wait();
                kernel_body(kernel_arguments);
            }
        });
    }
    for (auto& thread : crew) thread.join();
    return 0;
}

}  // namespace

#else

namespace {

void* scheduler_stack;

extern "C" void host_switch(void** save, void* to);
asm(R"(
.text
.type host_switch, @function
host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void enter() {
    kernel_body(kernel_arguments);
    current->state = DONE;
    void* never;
    host_switch(&never, scheduler_stack);
}

unsigned char* stacks() {
    static unsigned char* all = [] {
        constexpr unsigned COUNT = MOST_BLOCKS * MOST_THREADS;
        auto* p = static_cast<unsigned char*>(mmap(nullptr, STACK * COUNT, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        for (unsigned i = 0; i < COUNT; ++i) mprotect(p + STACK * i, PAGE, PROT_NONE);
        return p;
    }();
    return all;
}

void prepare(Thread& thread, unsigned i) {
    thread.reset();
    auto** top = reinterpret_cast<void**>(stacks() + STACK * (i + 1) - 64);
    *--top = nullptr;  // enter() never returns; keeps the stack aligned as a call would
    *--top = reinterpret_cast<void*>(&enter);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    thread.stack = top;
}

// The static shared memory of each block, while another one's is in place.
class Aside {
public:
    Aside(unsigned char* shared, unsigned char* shared_end)
        : shared_(shared), size_(shared_end - shared), kept_(group_blocks, Bytes(shared, shared_end)) {}
    void bring(unsigned block) {
        if (block == here_) return;
        memcpy(kept_[here_].data(), shared_, size_);
        memcpy(shared_, kept_[here_ = block].data(), size_);
    }

private:
    using Bytes = std::vector<unsigned char>;
    unsigned char* shared_;
    size_t size_;
    std::vector<Bytes> kept_;
    unsigned here_ = 0;
};

void resume(Thread& thread, uint64_t first_block, Aside& aside) {
    thread.state = READY;
    current = &thread;
    thread_index = thread.index;
    rank = number_of(thread) % block_threads;
    block_index = place_in_grid(first_block + block_in_group());
    aside.bring(block_in_group());
    host_switch(&scheduler_stack, thread.stack);
}

// The threads of [first, last) leave the barrier once all are there. All must have come by one line.
bool release(State barrier, unsigned first, unsigned last, const char* name) {
    unsigned there = 0, gone = 0, line = 0;
    bool same = true;
    for (unsigned i = first; i < last; ++i) {
        gone += threads[i].state == DONE;
        if (threads[i].state != barrier) continue;
        if (there++ == 0) line = threads[i].line;
        same &= line == unsigned(threads[i].line);
    }
    char what[128];
    if (there && there + gone == last - first && (gone || !same)) {
        snprintf(what, sizeof what, gone ? "a thread exited before %s" : "%s diverges", name);
        fail(what, line);
    }
    if (there != last - first) return false;
    for (unsigned i = first; i < last; ++i) threads[i].state = READY;
    return true;
}

void run_group(uint64_t first_block, Aside& aside, uint64_t schedule) {
    const unsigned count = threads.size(), warps = count / WARP;
    for (unsigned i = 0; i < count; ++i) prepare(threads[i], i);
    std::vector<unsigned> warp_order(warps), lanes(WARP);
    for (unsigned w = 0; w < warps; ++w) warp_order[w] = w;
    for (unsigned i = 0; i < WARP; ++i) lanes[i] = i;
    for (unsigned idle = 0;;) {
        bool moved = false, polled = false;
        unsigned done = 0;
        if (schedule) shuffle(warp_order);
        for (unsigned w : warp_order) {
            bool again = true;
            while (again) {
                again = false;
                if (schedule) shuffle(lanes);
                for (unsigned l : lanes) {
                    Thread& thread = threads[w * WARP + l];
                    if (thread.state != READY && thread.state != POLLING) continue;
                    polled |= thread.state == POLLING;
                    resume(thread, first_block, aside);
                    moved |= thread.state != POLLING;
                }
                if (release(AT_WARP_BARRIER, w * WARP, (w + 1) * WARP, "a warp collective")) {
                    moved = true;
                    again = schedule & 1;
                }
            }
        }
        for (unsigned first = 0; first < count; first += block_threads) {
            const unsigned end = first + block_threads;
            for (unsigned g = first; g < end; g += GROUP)
                moved |= release(AT_GROUP_BARRIER, g, std::min(g + GROUP, end), "a warpgroup instruction");
            moved |= release(AT_BLOCK_BARRIER, first, end, "__syncthreads");
        }
        const unsigned together = cluster_blocks * block_threads;
        for (unsigned first = 0; first < count; first += together)
            moved |= release(AT_CLUSTER_BARRIER, first, first + together, "cluster_sync");
        for (const Thread& thread : threads) done += thread.state == DONE;
        if (done == count) break;
        if (bulk_copies_pending() && (!moved || !schedule || next_random() % 3 == 0)) {
            finish_bulk_copy(schedule ? next_random() : 0);
            moved = true;
        }
        idle = moved ? 0 : idle + 1;
        if (!moved && (!polled || idle > 1000)) fail("deadlock: every thread waits", current->line);
    }
    if (bulk_copies_pending()) fail("the block ended with bulk copies in flight", 0);
    for (Thread& thread : threads) {
        if (!thread.stores.empty()) fail("the block ended with bulk stores unread", 0);
        thread.land();
    }
}

int run_blocks(unsigned char* shared, unsigned char* shared_end, uint64_t schedule) {
    const uint64_t groups = uint64_t(grid_size.x) * grid_size.y * grid_size.z / group_blocks;
    const uint64_t count = host_ends && 2 * host_ends < groups ? 2 * host_ends : groups;
    std::vector<uint64_t> order(count);
    for (uint64_t i = 0; i < count; ++i) {
        const uint64_t g = i < (count + 1) / 2 ? i : groups - count + i;
        order[schedule & 1 ? count - 1 - i : i] = g;
    }
    if (schedule && !(schedule & 1)) shuffle(order);
    for (uint64_t g : order) {
        poison(shared, shared_end);
        Aside aside(shared, shared_end);
        run_group(g * group_blocks, aside, schedule);
    }
    return 0;
}

}  // namespace

void wait(State barrier, int line) {
    Thread* me = current;
    me->state = barrier;
    me->line = line;
    host_switch(&me->stack, scheduler_stack);
}

#endif

namespace {

// A guard page was touched, or the kernel does not end: leave it and say so.
void on_signal(int signal, siginfo_t* info, void*) {
    if (signal == SIGVTALRM) {
        snprintf(message, sizeof message, "no end after %d s: an endless loop?", SECONDS);
    } else {
        snprintf(message, sizeof message, "address %p is outside every array, thread %u of block (%u, %u, %u)",
                 info->si_addr, rank, block_index.x, block_index.y, block_index.z);
    }
    longjmp(escape, 1);
}

struct Signals {
    static constexpr int CAUGHT[3] = {SIGSEGV, SIGBUS, SIGVTALRM};
    struct sigaction before[3];
    stack_t stack_before;
    itimerval timer_before;
    Signals() {
        static unsigned char alternate[64 << 10];
        stack_t stack = {};
        stack.ss_sp = alternate;
        stack.ss_size = sizeof alternate;
        sigaltstack(&stack, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < 3; ++i) sigaction(CAUGHT[i], &action, &before[i]);
        const itimerval limit = {{0, 0}, {SECONDS, 0}};
        setitimer(ITIMER_VIRTUAL, &limit, &timer_before);
    }
    ~Signals() {
        setitimer(ITIMER_VIRTUAL, &timer_before, nullptr);
        for (int i = 0; i < 3; ++i) sigaction(CAUGHT[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};
constexpr int Signals::CAUGHT[3];

int run_guarded(unsigned char* shared, unsigned char* shared_end, uint64_t schedule) {
#ifdef HOST_THREADS
    return run_blocks(shared, shared_end, schedule);
#else
    Signals signals;
    if (setjmp(escape)) {
        drop_bulk_copies();
        return 1;
    }
    return run_blocks(shared, shared_end, schedule);
#endif
}

}  // namespace

int run(Body body, void** arguments, const unsigned* grid, const unsigned* block, unsigned cluster,
        bool resident, size_t dynamic, unsigned char* shared, unsigned char* shared_end, uint64_t schedule) {
    const unsigned count = block[0] * block[1] * block[2];
    if (count == 0 || count > MOST_THREADS || count % WARP) {
        snprintf(message, sizeof message, "expected a block of whole warps, at most 1024 threads, got %u", count);
        return 1;
    }
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) {
        snprintf(message, sizeof message, "grid (%u, %u, %u) is empty or too large", grid[0], grid[1], grid[2]);
        return 1;
    }
    if (cluster == 0 || cluster > MOST_BLOCKS || grid[0] % cluster) {
        snprintf(message, sizeof message, "expected a grid in clusters of %u, at most %u, got %u", cluster,
                 MOST_BLOCKS, grid[0]);
        return 1;
    }
    const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
    if (resident && blocks > MOST_BLOCKS) {
        snprintf(message, sizeof message, "expected at most %u blocks that wait for one another", MOST_BLOCKS);
        return 1;
    }
    kernel_body = body;
    kernel_arguments = arguments;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    random_state = schedule * 0x9e3779b97f4a7c15ull + 1;
    block_threads = count;
    cluster_blocks = cluster;
    group_blocks = resident ? unsigned(blocks) : cluster;
    dynamic_stride = (dynamic + 1023) & ~size_t{1023};
    dynamic_memory.resize(group_blocks * dynamic_stride + 1024);
    dynamic_start = dynamic_memory.data() + (-reinterpret_cast<uintptr_t>(dynamic_memory.data()) & 1023);
    threads.resize(group_blocks * count);
    for (unsigned t = 0; t < threads.size(); ++t) {
        const unsigned i = t % count;
        threads[t].index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
    }
    return run_guarded(shared, shared_end, schedule);
}

}  // namespace host

extern "C" const char* host_error() { return host::message; }
