"""The CUDA backend: C++ kernels that NVRTC compiles at run time, one `.cu` beside each launcher.

Hot path: an operator's file → its `.cu` → `include/product.cuh`. `compile.py` makes machine code,
`launch.py` runs it, `code.py` turns the tables' formulas into C++. It takes C-contiguous CuPy
arrays of float32 or float64. Importing it loads neither CuPy nor NVRTC.
"""

from backprop_kernels.cuda.batch_norm import batch_norm_backward, batch_norm_forward
from backprop_kernels.cuda.epilogue import SAVES_BITS as SAVES_BITS
from backprop_kernels.cuda.gather_rows import gather_rows
from backprop_kernels.cuda.launch import capture
from backprop_kernels.cuda.layer_norm import layer_norm_backward, layer_norm_forward
from backprop_kernels.cuda.linear_dgrad import linear_dgrad
from backprop_kernels.cuda.linear_forward import linear_forward
from backprop_kernels.cuda.linear_wgrad import linear_wgrad
from backprop_kernels.cuda.loss import loss
from backprop_kernels.cuda.mlp_step import mlp_step
from backprop_kernels.cuda.optimizer_step import optimizer_step
from backprop_kernels.cuda.sparse_input import sparse_input_forward, sparse_input_wgrad

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
