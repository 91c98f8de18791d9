"""The reference backend: plain array code, no tricks, one file per operator.

It takes float32, float64 and complex arrays (complex, so that complex step can prove every
derivative), in any layout. It is the oracle of the tests, and serves where Numba cannot.
"""

from backprop_kernels.reference.batch_norm import batch_norm_backward, batch_norm_forward
from backprop_kernels.reference.gather_rows import gather_rows
from backprop_kernels.reference.layer_norm import layer_norm_backward, layer_norm_forward
from backprop_kernels.reference.linear_dgrad import linear_dgrad
from backprop_kernels.reference.linear_forward import linear_forward
from backprop_kernels.reference.linear_wgrad import linear_wgrad
from backprop_kernels.reference.loss import loss
from backprop_kernels.reference.mlp_step import mlp_step
from backprop_kernels.reference.optimizer_step import optimizer_step
from backprop_kernels.reference.program import capture
from backprop_kernels.reference.sparse_input import sparse_input_forward, sparse_input_wgrad

__all__ = [
    "batch_norm_backward",
    "batch_norm_forward",
    "capture",
    "gather_rows",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_dgrad",
    "linear_forward",
    "linear_wgrad",
    "loss",
    "mlp_step",
    "optimizer_step",
    "sparse_input_forward",
    "sparse_input_wgrad",
]
