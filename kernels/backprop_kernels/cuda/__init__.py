"""The CUDA backend: C++ kernels that NVRTC compiles at run time, one `.cu` beside each launcher.

Hot path: an operator's file → its `.cu` → `include/product.cuh`. `compile.py` makes machine code,
`launch.py` runs it, `code.py` turns the tables' formulas into C++. It takes C-contiguous CuPy
arrays of float32 or float64. Importing it loads neither CuPy nor NVRTC.
"""

from backprop_kernels.cuda.launch import capture
from backprop_kernels.cuda.linear_dgrad import linear_dgrad
from backprop_kernels.cuda.linear_forward import linear_forward
from backprop_kernels.cuda.linear_wgrad import linear_wgrad

__all__ = [
    "capture",
    "linear_dgrad",
    "linear_forward",
    "linear_wgrad",
]
