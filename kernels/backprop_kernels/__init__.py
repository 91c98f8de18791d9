"""Every kernel of fused-backprop: three backends with the same functions, and the tables they read.

`operators.py` lists what exists. `reference` is plain array code and proves the others,
`cpu` is Numba. Backends are imported on use; importing this package loads nothing.
"""
