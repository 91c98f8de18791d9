"""Numbered checkpoints in a folder: the newest whole one is found by reading it.

A checkpoint is written beside the ones before it (`durable_file.py`), and only then is an old one
removed. So whatever happens to the newest, by a crash or on the disk, an older one is there.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from backprop_kernels.arrays import Array
from backprop_kernels.errors import CheckpointCorruptError, CheckpointFormatError, DataError

from backprop.checkpoint import read_tensors, write_tensors

NAME = re.compile(r"checkpoint-(\d{6,})\.safetensors")
KEPT = 2
STATE = "fused-backprop.fit"  # the metadata entry of a file that holds a fit in progress
PREFIX = "fit"  # of the names of its tensors, which are no part of the model


class Generations:
    """The checkpoints of one run, in `folder`; the newest `keep` of them stay."""

    def __init__(self, folder: str | os.PathLike[str], keep: int = KEPT) -> None:
        self.folder = Path(folder)
        self.keep = keep

    def files(self) -> list[Path]:
        """All of them, whole or not, newest first."""
        if not self.folder.is_dir():
            return []
        numbered = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        found = [(int(match[1]), path) for match, path in numbered if match]
        return [path for _, path in sorted(found, reverse=True)]

    def save(self, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> Path:
        """Write the next one, durably; then remove those that are too many."""
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.files()
        match = NAME.fullmatch(before[0].name) if before else None
        number = int(match[1]) + 1 if match else 1
        path = self.folder / f"checkpoint-{number:06d}.safetensors"
        write_tensors(path, tensors, metadata)
        for old in before[self.keep - 1 :]:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
        return path

    def newest(self) -> tuple[Path, dict[str, Array], dict[str, str]] | None:
        """The newest whole one: (path, tensors, metadata). None in an empty folder.

        Warns of newer ones that cannot be read, and raises CheckpointCorruptError when none can.
        """
        problems: list[str] = []
        for path in self.files():
            try:
                found = read_tensors(path, require_checksums=True)
            except (CheckpointFormatError, OSError) as problem:
                problems.append(str(problem))
                continue
            if problems:
                warnings.warn(
                    f"checkpoint: {path.name} is used, because of newer ones: "
                    f"{'; '.join(problems)}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return path, *found
        if problems:
            raise CheckpointCorruptError(
                f"checkpoint: {self.folder}: expected one whole checkpoint of {len(problems)}, got "
                f"none: {'; '.join(problems)}"
            )
        return None


def read_checkpoint(
    path: str | os.PathLike[str],
) -> tuple[Path, dict[str, Array], dict[str, str]]:
    """(path, tensors, metadata) of a file, or of the newest whole one in a folder."""
    path = Path(path)
    if not path.is_dir():
        return path, *read_tensors(path)
    found = Generations(path).newest()
    if found is None:
        raise DataError(f"checkpoint: {path}: expected checkpoints in this folder, got none")
    return found


def model_part(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Without what only a fit needs."""
    return {name: t for name, t in tensors.items() if not name.startswith(f"{PREFIX}.")}
