"""Checkpoints in a folder: whatever fails, at whatever call, one whole generation can be read."""

from __future__ import annotations

import contextlib
import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

import backprop as bp
from backprop.checkpoint import write_tensors
from backprop.generations import Generations, read_checkpoint
from tests.backprop.test_durable_file import Crash, faulty_os


def save(folder: Path, value: int, keep: int = 2) -> Path:
    return Generations(folder, keep).save({"v": np.full(3, value)}, {"value": str(value)})


def value_of(folder: Path) -> int:
    found = Generations(folder).newest()
    assert found is not None
    _, tensors, metadata = found
    value = int(metadata["value"])
    np.testing.assert_array_equal(tensors["v"], value)
    return value


def test_numbers_grow_and_the_oldest_go(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    assert Generations(folder).files() == [] and Generations(folder).newest() is None
    for value in range(5):
        assert save(folder, value, 3).name == f"checkpoint-{value + 1:06d}.safetensors"
        assert value_of(folder) == value
    names = [f"checkpoint-{number:06d}.safetensors" for number in (3, 4, 5)]
    assert sorted(os.listdir(folder)) == names
    (folder / "checkpoint-1000000.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("kept")
    os.utime(folder / names[0])  # time of change says nothing
    with pytest.warns(RuntimeWarning, match="checkpoint-000005.safetensors is used, because"):
        assert value_of(folder) == 4
    assert save(folder, 9).name == "checkpoint-1000001.safetensors"
    assert sorted(os.listdir(folder)) == [
        "checkpoint-1000000.safetensors", "checkpoint-1000001.safetensors", "notes.txt"
    ]  # fmt: skip


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, Crash])
def test_a_fault_at_any_call_leaves_the_old_or_the_new(
    fault: int | type[Crash], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for at in range(100):
        folder = tmp_path / str(at)
        save(folder, 1)
        save(folder, 2)
        with faulty_os(monkeypatch, fault=fault, at=at) as fake:
            expected = (Crash, bp.CheckpointWriteError)
            with contextlib.suppress(*expected):
                save(folder, 3)
        if len(fake.log) <= at:
            break
        found.append(value_of(folder))
        save(folder, 4)
        assert value_of(folder) == 4
        assert len(os.listdir(folder)) == 2, "nothing is left of the save that failed"
    assert len(found) >= 10 and found == sorted(found) and set(found) == {2, 3}


def test_a_full_disk_ends_the_fit_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = np.random.default_rng(0).normal(size=(16, 3))

    def fit(epochs: int, resume: bool) -> bp.Sequential:
        model = bp.MLP([3, 4, 1], device="reference")
        bp.fit(model, X, X[:, 0], epochs=epochs, checkpoint=tmp_path, resume=resume, progress=False)
        return model

    fit(2, False)
    with (
        faulty_os(monkeypatch, fault=errno.ENOSPC, at=4),
        pytest.raises(bp.CheckpointWriteError, match="No space left on device"),
    ):
        fit(4, True)
    whole = bp.MLP([3, 4, 1], device="reference")
    bp.fit(whole, X, X[:, 0], epochs=4, progress=False)
    np.testing.assert_array_equal(fit(4, True).parameters, whole.parameters)


def test_every_damaged_byte_is_noticed_and_the_one_before_used(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    whole = path.read_bytes()
    damaged = [
        *(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))),
        *(whole[:length] for length in range(len(whole))),
        whole + b"\0",
    ]
    for content in damaged:
        path.write_bytes(content)
        with pytest.warns(RuntimeWarning, match=path.name):
            assert value_of(tmp_path) == 1
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(tmp_path) == 2


def test_what_happened_is_said(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning) as caught:
        value_of(tmp_path)
    message = str(caught[0].message)
    assert message.startswith("checkpoint: checkpoint-000001.safetensors is used, because of newer")
    assert f"{path}: data: expected" in message and "the file is damaged" in message
    for file in Generations(tmp_path).files():
        write_tensors(file, {}, {})
        file.write_bytes(b"{}")
    with pytest.raises(bp.CheckpointCorruptError, match="expected one whole checkpoint of 2, got"):
        Generations(tmp_path).newest()
    with pytest.raises(bp.DataError, match="expected checkpoints in this folder, got none"):
        read_checkpoint(tmp_path.parent)


def test_files_without_checksums_are_no_generation(tmp_path: Path) -> None:
    """Another program may have written or changed them."""
    from safetensors.numpy import save_file

    save(tmp_path, 1)
    save_file({"v": np.zeros(3)}, tmp_path / "checkpoint-000002.safetensors", {"value": "0"})
    with pytest.warns(RuntimeWarning, match=r"expected sha256\.header"):
        assert value_of(tmp_path) == 1
