// stepping: what changes from one training step to the next, on the device, so that a captured step
// needs nothing from the host.
//
// state (7): how many steps were applied, the learning rate, whether a step was refused since the
// host last looked, then what became of the last step: its loss, norm, whether it was applied, and
// the optimizer's guard, NaN where nothing may change.
// options (rows, 1 + n): what lr is scaled by, then the rule's numbers     value (), norm (): the step's
// table (rows, width): the optimizer's scalars from column `first` on           stream: dropout's, seed, step
//
// In the order of a step: `remember` the running statistics that forward will move; after backward
// `step_scalars`, then the optimizer; `step_end` counts the step or refuses all further ones;
// `take_back` the statistics of a step that was not applied.
// variant.cuh gives `scalars(step, lr, numbers, row)` in float64.
#include "variant.cuh"

enum { STEPS, RATE, STOPPED, LOSS, NORM, APPLIED, GUARD };
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
remember(const u32* now, u32* before, long long words) {
    const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
    if (i < words) before[i] = now[i];
}

extern "C" __global__ void __launch_bounds__(THREADS)
step_scalars(double* state, const double* value, const double* options, double* table, long long rows,
             long long options_width, long long width, long long first) {
    for (long long r = threadIdx.x; r < rows; r += THREADS) {
        const double* o = options + r * options_width;
        scalars(state[STEPS] + 1, state[RATE] * o[0], o + 1, table + r * width + first);
    }
    if (threadIdx.x == 0) state[GUARD] = state[STOPPED] != 0 ? nan("") : value[0];
}

extern "C" __global__ void __launch_bounds__(32)
step_end(double* state, const double* value, const double* norm, long long* stream) {
    if (threadIdx.x) return;
    const bool applied = isfinite(norm[0]) && isfinite(state[GUARD]);
    state[LOSS] = value[0];
    state[NORM] = norm[0];
    state[APPLIED] = applied;
    if (applied) {
        state[STEPS] += 1;
        stream[1] = (long long)state[STEPS];
    } else {
        state[STOPPED] = 1;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
take_back(const double* state, const u32* before, u32* now, long long words) {
    const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
    if (i < words && state[APPLIED] == 0) now[i] = before[i];
}
