// What surrounds every loss: the rows' shares of the mean, and the sum of the values.
//
// weights (rows) or null, labels (rows) or null, class_weight (classes) or null    read
// totals, wrong (blocks): the sum of the weights, and how many labels are no class    written
// shares (rows): weight / the sum of all weights, or / `whole` where that is not 0    written
// mass () or null: the sum of all weights                                             written
// values (blocks)    read;    value ()    written
// A label that is no class is never an index: its row weighs NaN, and so does everything after it;
// the launcher reads `wrong`. label_t is the integer type of the labels. Float64, as value is.
#include "variant.cuh"
#include "reduce.cuh"

// A label as a signed number; an unsigned one that has none becomes the largest, which is no class.
DEVICE long long signed_label(label_t label) {
    const long long number = (long long)(label);
    return label_t(-1) > label_t(0) && number < 0 ? 0x7fffffffffffffffll : number;
}

DEVICE bool is_class(long long label, long long classes) { return label >= 0 && label < classes; }

// What row i weighs in the sum of losses; an ignored one nothing.
DEVICE double row_weight(const real* weights, const label_t* labels, long long ignored,
                         long long classes, long long i) {
    const double weight = weights ? double(weights[i]) : 1.0;
    if (!labels) return weight;
    const long long label = signed_label(labels[i]);
    if (label == ignored) return 0.0;
    return is_class(label, classes) ? weight : double(nan(""));
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss_weights(const real* weights, const label_t* labels, long long ignored, long long classes,
             const real* class_weight, double* totals, long long* wrong, long long rows) {
    double total = 0;
    long long bad = 0;
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < rows;
         i += gridDim.x * (long long)THREADS) {
        double weight = row_weight(weights, labels, ignored, classes, i);
        // Class weights of ids count as sample weights: the mean divides by them too.
        if (labels && class_weight && weight > 0) weight *= double(class_weight[labels[i]]);
        if (labels) {
            const long long label = signed_label(labels[i]);
            bad += label != ignored && !is_class(label, classes);
        }
        total += weight;
    }
    total = block_sum(total);
    bad = block_sum(bad);
    if (threadIdx.x == 0) {
        totals[blockIdx.x] = total;
        wrong[blockIdx.x] = bad;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss_shares(const real* weights, const label_t* labels, long long ignored, long long classes,
            const double* totals, long long count, real* shares, long long rows, long long whole,
            double* mass) {
    const double total = array_sum(totals, count);
    if (mass && blockIdx.x == 0 && threadIdx.x == 0) *mass = total;
    for (long long i = blockIdx.x * (long long)THREADS + threadIdx.x; i < rows;
         i += gridDim.x * (long long)THREADS) {
        const double weight = row_weight(weights, labels, ignored, classes, i);
        shares[i] = weight == 0 || total == 0 ? real(0) : real(weight / (whole ? double(whole) : total));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
loss_value(const double* values, long long count, double* value) {
    const double sum = array_sum(values, count);
    if (threadIdx.x == 0) value[0] = sum;
}
