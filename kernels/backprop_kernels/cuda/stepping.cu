// stepping: what changes from one training step to the next, on the device, so that a captured step
// needs nothing from the host.
//
// state (9): how many steps were applied, the learning rate, whether a step was refused since the
// host last looked, then what became of the last step: its loss, norm, whether it was applied, and
// the optimizer's guard, NaN where nothing may change; of a step that is made of parts, what their rows
// weighed so far, and the sum of their shares of its loss.
// options (rows, 1 + n): what lr is scaled by, then the rule's numbers     value (), norm (): the step's
// table (rows, width): the optimizer's scalars from column `first` on           stream: dropout's, seed, step
// before (): how many rows of the step came before this part of it, which has room for `room`
// mass (): what the rows of a part weigh; whole: those of all parts
//
// In the order of a step: `remember` the running statistics that forward will move; after backward
// `step_scalars`, then the optimizer; `step_end` counts the step or refuses all further ones;
// `take_back` the statistics of a step that was not applied. A part has `part_end` in the place of the
// optimizer and `step_end`; these follow its last part. The first that is not finite is the last that counts.
// variant.cuh gives `scalars(step, lr, numbers, row)` in float64.
#include "variant.cuh"

enum { STEPS, RATE, STOPPED, LOSS, NORM, APPLIED, GUARD, MASS, SHARES };
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
remember(const long long* rows_before, const u32* now, u32* before, long long words) {
    const long long i = blockIdx.x * (long long)THREADS + threadIdx.x;
    if (i < words && *rows_before == 0) before[i] = now[i];
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
part_end(double* state, double* value, const double* mass, long long* before, double whole, long long room) {
    if (threadIdx.x) return;
    state[MASS] += *mass;
    state[SHARES] += value[0];
    if (*mass != 0) value[0] *= whole / *mass;  // the mean over this part
    const bool fine = isfinite(value[0]) && state[STOPPED] == 0;
    state[LOSS] = value[0];
    state[NORM] = nan("");
    state[APPLIED] = fine;
    if (!fine) state[STOPPED] = 1;
    *before += room;
}

extern "C" __global__ void __launch_bounds__(32)
step_end(double* state, const double* value, const double* norm, long long* stream, long long* before) {
    if (threadIdx.x) return;
    state[MASS] = state[SHARES] = 0;
    *before = 0;
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
