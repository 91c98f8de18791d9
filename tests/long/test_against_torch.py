"""PyTorch trains the same networks: weights copied over, 20 steps, parameters compared.

Differences are relative to each tensor's largest entry. The worst seen is 3e-15 in float64 and 3e-6
in float32, where roundings differ at every operation and training may amplify them; the bounds
leave that room on other processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import backprop as bp
from backprop.layers import Layer

torch = pytest.importorskip("torch", reason="the comparison needs PyTorch (the `torch` extra)")
F = torch.nn.functional
pytestmark = pytest.mark.long

STEPS = 20
BOUND = {"float64": 1e-12, "float32": 1e-4}

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
    "hardsigmoid": lambda z: F.relu6(z + 3) / 6,  # F.hardsigmoid has 1/6 in float32 in float64 too
    "hardswish": F.hardswish,
    "squareplus": lambda z: (z + torch.sqrt(z * z + 4)) / 2,
    "sin": torch.sin,
    "exp": torch.exp,
}


def weighted(rows: Any, weight: Any) -> Any:
    """The weighted mean over rows of what torch gives with reduction="none"."""
    rows = rows.reshape(len(rows), -1).mean(dim=1)
    return rows.mean() if weight is None else (rows * weight).sum() / weight.sum()


def cross_entropy(Z: Any, t: Any, w: Any, **options: Any) -> Any:
    if w is None:
        return F.cross_entropy(Z, t, **options)
    rows = F.cross_entropy(Z, t, reduction="none", **options)
    counted = (t != -100).to(Z.dtype) if t.ndim == 1 else torch.ones_like(rows)
    if t.ndim == 1 and "weight" in options:
        counted = counted * options["weight"][t.clamp(min=0)]
    return (rows * w).sum() / (w * counted).sum()


def quantile(Z: Any, t: Any, weight: Any, q: float) -> Any:
    return weighted(torch.maximum(q * (t - Z), (q - 1) * (t - Z)), weight)


def gaussian_nll(Z: Any, t: Any, weight: Any) -> Any:
    mu, s = Z.chunk(2, dim=1)
    rows = F.gaussian_nll_loss(mu, t, s.exp(), reduction="none", eps=0.0)
    return weighted(rows, weight)


def focal(Z: Any, t: Any, weight: Any, alpha: float = 0.25, gamma: float = 2.0) -> Any:
    p = torch.sigmoid(torch.where(t == 1, Z, -Z))
    cost = -torch.where(t == 1, alpha, 1 - alpha) * (1 - p) ** gamma * p.log()
    return weighted(cost, weight)


CLASS_WEIGHT = [0.5, 2.0, 1.0, 0.0]
# ours; torch's (output, target, weight) → loss; targets
LOSSES: dict[str, tuple[bp.Loss, Callable[..., Any], str]] = {
    "mse": (bp.Loss("mse"), lambda Z, t, w: weighted((Z - t) ** 2, w), "real"),
    "mae": (
        bp.Loss("mae"),
        lambda Z, t, w: weighted(F.l1_loss(Z, t, reduction="none"), w),
        "real",
    ),
    "huber": (
        bp.Loss("huber", delta=0.7),
        lambda Z, t, w: weighted(F.huber_loss(Z, t, reduction="none", delta=0.7), w),
        "real",
    ),
    "log_cosh": (
        bp.Loss("log_cosh"),
        lambda Z, t, w: weighted(torch.log(torch.cosh(Z - t)), w),
        "real",
    ),
    "poisson": (
        bp.Loss("poisson"),
        lambda Z, t, w: weighted(F.poisson_nll_loss(Z, t, reduction="none"), w),
        "counts",
    ),
    "quantile": (
        bp.Loss("quantile", q=0.8),
        lambda Z, t, w: quantile(Z, t, w, 0.8),
        "real",
    ),
    "cross_entropy": (bp.Loss("cross_entropy"), cross_entropy, "ids"),
    "cross_entropy smoothed": (
        bp.Loss("cross_entropy", label_smoothing=0.2),
        lambda Z, t, w: cross_entropy(Z, t, w, label_smoothing=0.2),
        "ids",
    ),
    "cross_entropy weighted": (
        bp.Loss("cross_entropy", class_weight=CLASS_WEIGHT, label_smoothing=0.2),
        lambda Z, t, w: cross_entropy(
            Z, t, w, label_smoothing=0.2, weight=torch.tensor(CLASS_WEIGHT, dtype=Z.dtype)
        ),
        "ids",
    ),
    "cross_entropy ignoring": (bp.Loss("cross_entropy"), cross_entropy, "ids, some ignored"),
    "cross_entropy of probabilities": (
        bp.Loss("cross_entropy", class_weight=CLASS_WEIGHT, label_smoothing=0.2),
        lambda Z, t, w: cross_entropy(
            Z, t, w, label_smoothing=0.2, weight=torch.tensor(CLASS_WEIGHT, dtype=Z.dtype)
        ),
        "probabilities",
    ),
    "bce_with_logits": (
        bp.Loss("bce_with_logits", pos_weight=[1.0, 2.0, 0.5, 3.0]),
        lambda Z, t, w: weighted(
            F.binary_cross_entropy_with_logits(
                Z, t, reduction="none", pos_weight=torch.tensor([1.0, 2.0, 0.5, 3.0]).to(Z)
            ),
            w,
        ),
        "probability",
    ),
    "focal": (bp.Loss("focal"), focal, "binary"),
    "hinge": (
        bp.Loss("hinge"),
        lambda Z, t, w: weighted(torch.clamp(1 - t * Z, min=0), w),
        "sign",
    ),
    "gaussian_nll": (bp.Loss("gaussian_nll"), gaussian_nll, "half"),
}


def decay(value: float) -> dict[str, dict[str, float]]:
    """Weight decay of every tensor, as in PyTorch; ours spares biases unless told."""
    return {"*": {"weight_decay": value}}


OPTIMIZERS: dict[str, tuple[Callable[[], bp.Optimizer], Callable[[Any], Any]]] = {
    "SGD": (lambda: bp.SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD momentum": (
        lambda: bp.SGD(lr=0.05, momentum=0.9, groups=decay(0.01)),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    ),
    "SGD nesterov": (
        lambda: bp.SGD(lr=0.05, momentum=0.9, nesterov=True, groups=decay(0.01)),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    ),
    "RMSprop": (lambda: bp.RMSprop(lr=0.01), lambda p: torch.optim.RMSprop(p, lr=0.01)),
    "RMSprop momentum": (
        lambda: bp.RMSprop(lr=0.01, alpha=0.9, momentum=0.5, groups=decay(0.01)),
        lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.9, momentum=0.5, weight_decay=0.01),
    ),
    "Adam": (lambda: bp.Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    "Adam decay": (
        lambda: bp.Adam(lr=0.01, betas=(0.8, 0.95), eps=1e-3, groups=decay(0.1)),
        lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    ),
    "AdamW": (
        lambda: bp.AdamW(lr=0.01, groups=decay(0.1)),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ),
    "Adagrad": (
        lambda: bp.Adagrad(lr=0.05, lr_decay=0.1, groups=decay(0.01)),
        lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.1, weight_decay=0.01),
    ),
}


class MuonAndAdamW:
    """`torch.optim.Muon` takes matrices only: biases and the last layer go to AdamW."""

    def __init__(self, parameters: Any, nesterov: bool = True) -> None:
        parameters = list(parameters)
        hidden = [p for p in parameters if p.ndim == 2][:-1]
        others = [p for p in parameters if all(p is not W for W in hidden)]
        self.rules = (
            torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov),
            torch.optim.AdamW(others, lr=0.01, weight_decay=0.0),
        )

    def zero_grad(self) -> None:
        for rule in self.rules:
            rule.zero_grad()

    def step(self) -> None:
        for rule in self.rules:
            rule.step()


def muon(nesterov: bool = True) -> bp.Optimizer:
    return bp.Muon(lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1,
                   others=bp.AdamW(lr=0.01, weight_decay=0.0))  # fmt: skip


MUONS: dict[str, tuple[Callable[[], bp.Optimizer], Callable[[Any], Any]]] = {
    "Muon": (muon, MuonAndAdamW),
    "Muon plain": (lambda: muon(False), lambda p: MuonAndAdamW(p, False)),
}

NORMS = {
    bp.BatchNorm: torch.nn.BatchNorm1d, bp.LayerNorm: torch.nn.LayerNorm,
    bp.RMSNorm: torch.nn.RMSNorm,
}  # fmt: skip


class Twin(torch.nn.Module):  # type: ignore[misc, name-defined]
    """The same network in PyTorch; its state_dict has our names."""

    def __init__(self, model: bp.Sequential) -> None:
        super().__init__()
        self.layers, self.norms = torch.nn.ModuleList(), torch.nn.ModuleList()
        self.steps: list[tuple[Any, str]] = []
        for layer in model.layers:
            if isinstance(layer, bp.Linear):
                module = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias)
                self.layers.append(module)
            elif not isinstance(layer, bp.Dropout):
                module = NORMS[type(layer)](layer.features, eps=layer.eps)
                self.norms.append(module)
            else:
                continue
            self.steps.append((module, layer.activation))
        self.to(getattr(torch, str(model.dtype)))
        state = {name: torch.from_numpy(v) for name, v in model.state_dict().items()}
        missing = self.load_state_dict(state, strict=False)
        assert missing.unexpected_keys == []
        assert all(k.endswith("num_batches_tracked") for k in missing.missing_keys)

    def forward(self, X: Any) -> Any:
        for module, activation in self.steps:
            X = ACTIVATIONS[activation](module(X))
        return X


def targets(kind: str, rng: np.random.Generator, rows: int, outputs: int) -> Any:
    ids = rng.integers(0, outputs, rows)
    draw: dict[str, Callable[[], Any]] = {
        "real": lambda: rng.standard_normal((rows, outputs)),
        "counts": lambda: rng.poisson(2.0, (rows, outputs)).astype(float),
        "probability": lambda: rng.random((rows, outputs)),
        "binary": lambda: rng.integers(0, 2, (rows, outputs)).astype(float),
        "sign": lambda: rng.choice([-1.0, 1.0], (rows, outputs)),
        "ids": lambda: ids,
        "ids, some ignored": lambda: np.where(rng.random(rows) < 0.3, -100, ids),
        "probabilities": lambda: rng.dirichlet(np.ones(outputs), rows),
        "half": lambda: rng.standard_normal((rows, outputs // 2)),
    }
    return draw[kind]()


def compare(
    model: bp.Sequential, loss: str = "mse", optimizer: str = "SGD", weight: bool = False,
    clip_norm: float | None = None,
) -> float:  # fmt: skip
    """Largest difference after 20 steps, relative to each tensor's largest entry."""
    ours, theirs, kind = LOSSES[loss]
    make_ours, make_theirs = (OPTIMIZERS | MUONS)[optimizer]
    rng = np.random.default_rng(1)
    twin = Twin(model)
    rule = make_theirs(twin.parameters())
    step = bp.TrainStep(model, ours, make_ours(), batch_size=32, clip_norm=clip_norm)
    dtype = getattr(torch, str(model.dtype))
    for number in range(STEPS):
        rows = 32 if number % 5 else 13
        X = rng.standard_normal((rows, model.in_features)).astype(model.dtype)
        y = targets(kind, rng, rows, model.out_features)
        w = rng.random(rows) + 0.1 if weight else None
        value = step(X, y, w)
        t = torch.from_numpy(y)
        t = t.to(dtype) if t.is_floating_point() else t
        rule.zero_grad()
        t_weight = None if w is None else torch.from_numpy(w).to(dtype)
        cost = theirs(twin(torch.from_numpy(X)), t, t_weight)
        cost.backward()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip_norm)
        rule.step()
        assert value == pytest.approx(cost.item(), rel=1e-4 if dtype == torch.float32 else 1e-12)
    worst = 0.0
    for name, value_of_twin in twin.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            exact, got = value_of_twin.numpy(), model.state_dict()[name]
            worst = max(worst, float(np.abs(got - exact).max() / np.abs(exact).max()))
    return worst


def network(activation: str, dtype: str, device: str, seed: int = 0) -> bp.Sequential:
    layers: list[Layer] = [
        bp.Linear(7, 19, activation, init="glorot_normal"),
        bp.Linear(19, 11, activation, init="glorot_normal"),
        bp.Linear(11, 4, init="glorot_normal"),
    ]
    model = bp.Sequential(layers, dtype=dtype, device=device, seed=seed)
    if activation == "exp":  # else exp(exp(z)) overflows in a few steps
        model.parameters *= 0.2
    return model


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: str, device: str) -> None:
    assert compare(network(activation, dtype, device)) <= BOUND[dtype]


@pytest.mark.parametrize("weight", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str, dtype: str, weight: bool, device: str) -> None:
    model = network("tanh", dtype, device)
    assert compare(model, loss, weight=weight) <= BOUND[dtype]


@pytest.mark.parametrize("clip_norm", [None, 0.3])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer: str, dtype: str, clip_norm: float | None, device: str) -> None:
    model = network("gelu", dtype, device)
    assert compare(model, "cross_entropy", optimizer, clip_norm=clip_norm) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("optimizer", MUONS)
def test_muon(optimizer: str, dtype: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's Newton–Schulz steps are in bfloat16; here they keep the dtype of the matrix."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    assert compare(network("gelu", dtype, device), "cross_entropy", optimizer) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("norm", [bp.BatchNorm, bp.LayerNorm, bp.RMSNorm])
def test_every_norm(norm: Any, dtype: str, device: str) -> None:
    layers: list[Layer] = [
        norm(7), bp.Linear(7, 19, "tanh"), bp.Linear(19, 11, bias=norm is not bp.BatchNorm),
        norm(11, "silu"), bp.Linear(11, 4),
    ]  # fmt: skip
    model = bp.Sequential(layers, dtype=dtype, device=device)
    assert compare(model, "cross_entropy", "SGD momentum") <= BOUND[dtype]


@pytest.mark.parametrize("seed", range(10))
def test_random_networks(seed: int, device: str) -> None:
    rng = np.random.default_rng(seed)
    widths = [int(w) for w in rng.integers(1, 80, int(rng.integers(2, 6)))]
    names = list(ACTIVATIONS)[:-1]  # exp of exp overflows
    layers: list[Layer] = []
    for i in range(len(widths) - 1):
        activation = str(rng.choice(names))
        layers.append(bp.Linear(widths[i], widths[i + 1], activation, init="glorot_uniform"))
        if rng.random() < 0.3 and widths[i + 1] > 2:
            layers.append(bp.LayerNorm(widths[i + 1], str(rng.choice(names))))
    layers.append(bp.Linear(widths[-1], 4))
    model = bp.Sequential(layers, dtype="float64", device=device, seed=seed)
    loss = str(rng.choice([name for name in LOSSES if name != "focal"]))
    optimizer = str(rng.choice(["SGD", "SGD momentum", "AdamW", "Adagrad"]))
    assert compare(model, loss, optimizer) <= 1e-10, (layers, loss, optimizer)
