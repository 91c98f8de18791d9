"""Every error the project raises on purpose.

Each derives from `BackpropError` and from the built-in a caller would expect, so both
`except BackpropError` and `except ValueError` work.
Messages read `where: argument: expected … got …`, then what to do.
"""

from __future__ import annotations


class BackpropError(Exception):
    """Base of all errors raised by fused-backprop."""


class KindError(BackpropError, TypeError):
    """An argument has the wrong type or dtype."""


class ShapeError(BackpropError, ValueError):
    """An array has the wrong shape or layout."""


class OptionError(BackpropError, ValueError):
    """An option has an unknown name or a value outside its range."""


class LabelError(BackpropError, ValueError):
    """A class label or target lies outside what the loss accepts."""


class DataError(BackpropError, ValueError):
    """Data that cannot be used: NaN, infinity, ragged rows, empty files."""


class NonFiniteError(BackpropError, ArithmeticError):
    """Training met a NaN or an infinity. The step was not applied."""


class DeviceUnavailableError(BackpropError, RuntimeError):
    """The requested device cannot be used here; the message says why and what to install."""


class MissingExtraError(BackpropError, ImportError):
    """A feature needs a library that is not installed; the message says which extra brings it."""


class CheckpointFormatError(BackpropError, ValueError):
    """A file is not a checkpoint this version can read."""


class CheckpointCorruptError(CheckpointFormatError):
    """A checkpoint's checksum does not match its bytes."""


class CheckpointMismatchError(BackpropError, ValueError):
    """A checkpoint belongs to another architecture; every difference is listed."""


class CheckpointWriteError(BackpropError, OSError):
    """A checkpoint could not be written; the previous file is untouched."""


class KernelCompileError(BackpropError, RuntimeError):
    """A kernel did not compile; the message holds the file, the options and the compiler's log."""


class DeviceMemoryError(BackpropError, MemoryError):
    """The device has no room; the message says how much was needed and how much is free."""
