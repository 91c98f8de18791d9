"""THE operator table: what every backend must provide, and nothing else.

Shapes: n = batch, i = in_features, o = out_features, f = features, p = parameters.
`docs/derivations.md` has one section per row. Tests, docs and the layout check iterate over it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """One row: a file of this name in every backend, holding these functions."""

    name: str
    functions: tuple[str, ...]
    formula: str
    shapes: str
    fused: str
    saves: str


OPERATORS: tuple[Operator, ...] = (
    Operator(
        name="gather_rows",
        functions=("gather_rows",),
        formula="Y_r = X_(index_r)",
        shapes="X(m,…) index(n) → Y(n,…)",
        fused="nothing",
        saves="nothing",
    ),
    Operator(
        name="linear_forward",
        functions=("linear_forward",),
        formula="Y = dropout(act(X Wᵀ + b))",
        shapes="X(n,i) W(o,i) b(o) → Y(n,o)",
        fused="bias, activation, dropout",
        saves="Y or Z, as the activation table says; on a GPU a bit, where act' has two values",
    ),
    Operator(
        name="linear_dgrad",
        functions=("linear_dgrad",),
        formula="dZ_prev = (dZ W) ⊙ act'(Z_prev) ⊙ mask_prev;  db_prev = Σ_rows dZ_prev",
        shapes="dZ(n,o) W(o,i) saved_prev(n,i) → dZ_prev(n,i) db_prev(i)",
        fused="the layer below: activation derivative, dropout mask, bias gradient",
        saves="nothing",
    ),
    Operator(
        name="linear_wgrad",
        functions=("linear_wgrad",),
        formula="dW = dZᵀ X",
        shapes="dZ(n,o) X(n,i) → dW(o,i)",
        fused="on a GPU the optimizer's update, where every gradient is certain to be finite",
        saves="nothing",
    ),
    Operator(
        name="sparse_input",
        functions=("sparse_input_forward", "sparse_input_wgrad"),
        formula="Y = dropout(act(X Wᵀ + b));  dW = dZᵀ X;  where most of X is 0",
        shapes="X(n,i) W(o,i) b(o) → Y(n,o); dZ(n,o) X(n,i) → dW(o,i)",
        fused="bias, activation, dropout",
        saves="Y or Z, as the activation table says",
    ),
    Operator(
        name="loss",
        functions=("loss",),
        formula="L = Σ w l(act(Z), target) / Σ w;  dZ = ∂L/∂Z;  db = Σ_rows dZ",
        shapes="Z(n,o) target(n,o) or (n) weights(n) → L() dZ(n,o) db(o)",
        fused="output activation, softmax or sigmoid, class and sample weights, bias gradient",
        saves="nothing",
    ),
    Operator(
        name="optimizer_step",
        functions=("optimizer_step",),
        formula="P, state ← update(P, G, state), only if every element of G is finite",
        shapes="P(p) G(p) state(k,p) → norm() finite()",
        fused="finite check, clipping by norm and value, weight decay, penalties by span of P",
        saves="state",
    ),
    Operator(
        name="batch_norm",
        functions=("batch_norm_forward", "batch_norm_backward"),
        formula="Y = dropout(act(gamma (X − mean_n) rstd_n + beta)), statistics over the batch",
        shapes="X(n,f) gamma(f) beta(f) → Y(n,f) mean(f) rstd(f)",
        fused="activation, dropout; backward: the layer below, as in linear_dgrad",
        saves="mean, rstd; what linear_forward saves",
    ),
    Operator(
        name="layer_norm",
        functions=("layer_norm_forward", "layer_norm_backward"),
        formula="Y = dropout(act(gamma (X − mean_f) rstd_f + beta)), statistics over the features; "
        "not centred: mean_f = 0",
        shapes="X(n,f) gamma(f) beta(f) → Y(n,f) mean(n) rstd(n)",
        fused="activation, dropout; backward: the layer below, as in linear_dgrad",
        saves="mean, rstd; what linear_forward saves",
    ),
    Operator(
        name="mlp_step",
        functions=("mlp_step",),
        formula="L, G = ∂L/∂P for Y_l = act_l(Y_(l−1) W_lᵀ + b_l), Y_0 = X",
        shapes="X(n,i) target(n,o) or (n) P(p) weights(n) → L() G(p)",
        fused="every layer, forward and backward, and the loss",
        saves="nothing",
    ),
)
