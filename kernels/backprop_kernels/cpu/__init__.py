"""The CPU backend: Numba kernels, compiled once per machine, one file per operator.

Hot path: an operator's file → `product.py` → `tile.py`. `program.py` runs kernels, `threads.py`
holds the threads, `compile.py` the machine code. It takes float32 and float64 C-contiguous arrays.
"""

from backprop_kernels.cpu.batch_norm import batch_norm_backward, batch_norm_forward
from backprop_kernels.cpu.gather_rows import gather_rows
from backprop_kernels.cpu.layer_norm import layer_norm_backward, layer_norm_forward
from backprop_kernels.cpu.linear_dgrad import linear_dgrad
from backprop_kernels.cpu.linear_forward import linear_forward
from backprop_kernels.cpu.linear_wgrad import linear_wgrad
from backprop_kernels.cpu.loss import loss
from backprop_kernels.cpu.mlp_step import mlp_step
from backprop_kernels.cpu.optimizer_step import optimizer_step
from backprop_kernels.cpu.program import capture, check_compiler
from backprop_kernels.cpu.sparse_input import sparse_input_forward, sparse_input_wgrad

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

check_compiler()
