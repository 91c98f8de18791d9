"""fused-backprop: multi-layer perceptrons with fused kernels.

    import backprop as bp
    model = bp.MLP([155, 256, 128, 1])
    history = bp.fit(model, X, y, loss="bce_with_logits", epochs=8, batch_size=1024)
    model.predict(X)

Importing this costs NumPy and nothing else; Numba is loaded by the first step.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from backprop_kernels.errors import (
    BackpropError,
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointWriteError,
    DataError,
    DeviceMemoryError,
    DeviceUnavailableError,
    KernelCompileError,
    KindError,
    LabelError,
    MissingExtraError,
    NonFiniteError,
    OptionError,
    ShapeError,
)

from backprop import ops
from backprop.averaging import EMA
from backprop.callbacks import Callback, Training
from backprop.device import get_num_threads, set_num_threads
from backprop.evaluation import evaluate
from backprop.fit import fit
from backprop.gradcheck import GradientError, GradientReport, gradcheck
from backprop.gradients import value_and_grad
from backprop.history import History
from backprop.layers import BatchNorm, Dropout, LayerNorm, Linear, RMSNorm
from backprop.losses import Loss
from backprop.model import MLP, Sequential, load
from backprop.monitor import EarlyStopping
from backprop.muon import Muon
from backprop.optimizers import SGD, Adagrad, Adam, AdamW, Lion, Optimizer, RMSprop
from backprop.profile import Phase, Profile, profile
from backprop.resume import Checkpoint
from backprop.schedules import Plateau, Schedule
from backprop.step import TrainStep

if TYPE_CHECKING:
    from backprop import datasets
    from backprop.exchange.from_onnx import from_onnx
    from backprop.exchange.to_onnx import to_onnx
    from backprop.exchange.torch_names import from_torch, to_torch
    from backprop.health import Health
    from backprop.lbfgs import minimize
    from backprop.logs import CSVLog, JSONLog, TensorBoard
    from backprop.lr_finder import LRCurve, find_lr

__version__ = "0.1.0"

# What not every program needs is imported when it is first named: `import backprop` stays quick.
_LATER = {
    "datasets": "datasets",
    "from_onnx": "exchange",
    "from_torch": "exchange",
    "to_onnx": "exchange",
    "to_torch": "exchange",
    "Health": "health",
    "minimize": "lbfgs",
    "CSVLog": "logs",
    "JSONLog": "logs",
    "TensorBoard": "logs",
    "LRCurve": "lr_finder",
    "find_lr": "lr_finder",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'backprop' has no attribute {name!r}")
    module = import_module(f"backprop.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "EMA",
    "MLP",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BackpropError",
    "BatchNorm",
    "CSVLog",
    "Callback",
    "Checkpoint",
    "CheckpointCorruptError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "CheckpointWriteError",
    "DataError",
    "DeviceMemoryError",
    "DeviceUnavailableError",
    "Dropout",
    "EarlyStopping",
    "GradientError",
    "GradientReport",
    "Health",
    "History",
    "JSONLog",
    "KernelCompileError",
    "KindError",
    "LRCurve",
    "LabelError",
    "LayerNorm",
    "Linear",
    "Lion",
    "Loss",
    "MissingExtraError",
    "Muon",
    "NonFiniteError",
    "Optimizer",
    "OptionError",
    "Phase",
    "Plateau",
    "Profile",
    "RMSNorm",
    "RMSprop",
    "Schedule",
    "Sequential",
    "ShapeError",
    "TensorBoard",
    "TrainStep",
    "Training",
    "datasets",
    "evaluate",
    "find_lr",
    "fit",
    "from_onnx",
    "from_torch",
    "get_num_threads",
    "gradcheck",
    "load",
    "minimize",
    "ops",
    "profile",
    "set_num_threads",
    "to_onnx",
    "to_torch",
    "value_and_grad",
]
