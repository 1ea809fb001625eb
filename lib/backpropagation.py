r"""Forward pass, gradients and exact block Hessians of the feedforward network of Ghauch et al., in matrix form.

The network (1) is :math:`Z_j = \sigma_j(U_j)`, :math:`U_j = W_j Z_{j-1}`, :math:`Z_0 = X`, and the objective (2), (16) is
:math:`f(W) = \ell(Z_J, Y) + \sum_j \lambda_j \|W_j\|_F^2`. Layers count from 1, as in the paper.

Shapes: ``weights`` holds J tensors :math:`W_j` of ``(..., d_j, d_{j-1})``; ``X`` is ``(d_0, N)`` and ``Y`` ``(d_J, N)``,
or with leading dimensions of their own. Columns are samples, leading dimensions are runs.

``activation`` is one ``Activation`` for all layers, or a sequence of J. ``ridge`` is one number for all layers, a sequence
of J numbers (as a list or tuple), or a tensor with one number for each run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Ridge = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class Activation:
    r"""An elementwise function with its first two derivatives.

    Both derivatives of all our functions are functions of the output :math:`z = \sigma(u)`, so that nothing but outputs
    needs to be kept: :math:`\sigma'(u) = s(z)`, :math:`\sigma''(u) = t(z)`.

    Attributes:
        name: what tables call it.
        value: :math:`\sigma`.
        slope_at_output: :math:`s`.
        curvature_at_output: :math:`t`.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope_at_output: Callable[[Tensor], Tensor]
    curvature_at_output: Callable[[Tensor], Tensor]

    def slope(self, U: Tensor) -> Tensor:
        r""":math:`\sigma'(u)` elementwise, (A.8)."""
        return self.slope_at_output(self.value(U))

    def curvature(self, U: Tensor) -> Tensor:
        r""":math:`\sigma''(u)` elementwise."""
        return self.curvature_at_output(self.value(U))

    def __repr__(self) -> str:
        return f"<activation {self.name}>"


def _softplus(U: Tensor) -> Tensor:
    return F.softplus(U, threshold=50)  # torch's own threshold of 20 is off by 2e-9


LOGISTIC = Activation("logistic", torch.sigmoid, lambda z: z * (1 - z), lambda z: z * (1 - z) * (1 - 2 * z))
TANH = Activation("tanh", torch.tanh, lambda z: 1 - z * z, lambda z: -2 * z * (1 - z * z))
SOFTPLUS = Activation("softplus", _softplus, lambda z: -torch.expm1(-z), lambda z: -torch.expm1(-z) * torch.exp(-z))
LOG_SIGMOID = Activation(
    "log-sigmoid", F.logsigmoid, lambda z: -torch.expm1(z), lambda z: torch.expm1(z) * torch.exp(z)
)
IDENTITY = Activation("identity", lambda u: u, torch.ones_like, torch.zeros_like)


def forward(
    weights: Sequence[Tensor], X: Tensor, activation: Activation | Sequence[Activation]
) -> list[tuple[Tensor, Tensor]]:
    """The pairs :math:`(U_j, Z_j)` for :math:`j = 1, \\dots, J`, eq. (1), each ``(..., d_j, N)``.

    Raises:
        ValueError: if there is no layer, or widths do not fit.
    """
    layers, Z = [], X
    check_widths(weights, X)
    for W, sigma in zip(weights, as_activations(activation, len(weights)), strict=True):
        U = W @ Z
        Z = sigma.value(U)
        layers.append((U, Z))
    return layers


def objective(
    weights: Sequence[Tensor],
    X: Tensor,
    Y: Tensor,
    loss,
    activation: Activation | Sequence[Activation],
    ridge: Ridge = 0.0,
) -> Tensor:
    r""":math:`f(W) = \ell(Z_J, Y) + \sum_j \lambda_j \|W_j\|_F^2`, eqs. (2) and (16); ``(...)``."""
    total = loss.value(forward(weights, X, activation)[-1][1], Y)
    for j, W in enumerate(weights, start=1):
        total = total + ridge_of(ridge, j, len(weights)) * W.square().sum((-2, -1))
    return total


def deltas(
    weights: Sequence[Tensor], X: Tensor, Y: Tensor, loss, activation: Activation | Sequence[Activation]
) -> list[Tensor]:
    r"""The gradients :math:`\Delta_j` of the loss with respect to :math:`U_j`, ``(..., d_j, N)``, by the recursion (A.7).

    :math:`\Delta_J = \nabla_H\ell \circ \sigma'(U_J)`, and :math:`\Delta_j = (W_{j+1}^T \Delta_{j+1}) \circ \sigma'(U_j)`.
    """
    layers = forward(weights, X, activation)
    return _deltas_down_to(1, weights, layers, Y, loss, as_activations(activation, len(weights)))


def gradients(
    weights: Sequence[Tensor],
    X: Tensor,
    Y: Tensor,
    loss,
    activation: Activation | Sequence[Activation],
    ridge: Ridge = 0.0,
) -> list[Tensor]:
    r""":math:`\nabla_j f = \Delta_j Z_{j-1}^T + 2 \lambda_j W_j` (A.6) for all j, each like :math:`W_j`."""
    layers = forward(weights, X, activation)
    inputs = [X, *(Z for _, Z in layers)]
    J = len(weights)
    found = _deltas_down_to(1, weights, layers, Y, loss, as_activations(activation, J))
    return [
        delta @ Z.mT + 2 * _per_run(ridge_of(ridge, j, J)) * W
        for j, delta, Z, W in zip(range(1, J + 1), found, inputs, weights, strict=False)
    ]


def block_gradient(
    weights: Sequence[Tensor],
    j: int,
    X: Tensor,
    Y: Tensor,
    loss,
    activation: Activation | Sequence[Activation],
    ridge: Ridge = 0.0,
) -> Tensor:
    r""":math:`\nabla_j f` (A.6) of one block, like :math:`W_j`; the recursion stops at layer j.

    Raises:
        ValueError: if there is no block j.
    """
    check_block(j, weights)
    layers = forward(weights, X, activation)
    delta = _deltas_down_to(j, weights, layers, Y, loss, as_activations(activation, len(weights)))[0]
    Z = X if j == 1 else layers[j - 2][1]
    return delta @ Z.mT + 2 * _per_run(ridge_of(ridge, j, len(weights))) * weights[j - 1]


def block_hessian(
    weights: Sequence[Tensor],
    j: int,
    X: Tensor,
    Y: Tensor,
    loss,
    activation: Activation | Sequence[Activation],
    ridge: Ridge = 0.0,
    gauss_newton: bool = False,
) -> Tensor:
    r"""The exact Hessian of f in block j, with respect to the entries of :math:`W_j` in row-major order.

    For sample n let :math:`G_j` be the second derivative of the loss with respect to column n of :math:`U_j`. With
    :math:`C_n` and :math:`\kappa` of ``lib.losses``, s and t the first two derivatives of the activation,

    .. math::
        G_J &= \mathrm{diag}(s_J)\, C_n\, \mathrm{diag}(s_J) + \mathrm{diag}(\nabla_H\ell \circ t_J), \\
        G_i &= \mathrm{diag}(s_i)\, W_{i+1}^T G_{i+1} W_{i+1}\, \mathrm{diag}(s_i)
               + \mathrm{diag}((W_{i+1}^T \delta_{i+1}) \circ t_i), \\
        \nabla_j^2 f &= \sum_n G_j \otimes z_{j-1} z_{j-1}^T + \kappa\, \nabla_j\ell\, \nabla_j\ell^T + 2 \lambda_j I.

    Args:
        gauss_newton: drop the terms in t. What is left is positive semidefinite for a convex loss: the matrix of
            Levenberg and Marquardt, which (12) is not.

    Returns:
        ``(..., n, n)`` with :math:`n = d_j d_{j-1}`.

    Raises:
        ValueError: if there is no block j.
    """
    check_block(j, weights)
    J = len(weights)
    activations = as_activations(activation, J)
    layers = forward(weights, X, activations)
    H = layers[-1][1]
    pulled, G = loss.gradient(H, Y), loss.curvature(H, Y)  # with respect to Z_i, here and at the end of the loop
    for i in range(J, j - 1, -1):
        Z = layers[i - 1][1]
        slope = activations[i - 1].slope_at_output(Z)
        G = (slope.mT.unsqueeze(-1) * G).mul_(slope.mT.unsqueeze(-2))
        if not gauss_newton:
            G.diagonal(dim1=-2, dim2=-1).add_((pulled * activations[i - 1].curvature_at_output(Z)).mT)
        delta = pulled * slope
        if i > j:
            pulled, G = weights[i - 1].mT @ delta, _congruence(G, weights[i - 1])
    Z = X if j == 1 else layers[j - 2][1]
    return _assemble(G, delta, Z, loss.coupling(H, Y), ridge_of(ridge, j, J))


def _congruence(G: Tensor, W: Tensor) -> Tensor:
    """:math:`W^T G_n W` for symmetric :math:`G_n`, ``(..., N, d, d)``: two products a run, whatever N is."""
    GW = (G.flatten(-3, -2) @ W).unflatten(-2, (-1, W.shape[-2]))
    return (GW.mT.flatten(-3, -2) @ W).unflatten(-2, (-1, W.shape[-1]))


def _assemble(G: Tensor, delta: Tensor, Z: Tensor, coupling: Tensor | float, ridge: Tensor | float) -> Tensor:
    """The last line of :func:`block_hessian`. Both factors of a Kronecker product are symmetric: half of each is enough."""
    (a, b), pair_ab = _pairs(G.shape[-1], G.device)
    (k, m), pair_km = _pairs(Z.shape[-2], Z.device)
    halves = G[..., a, b].mT @ (Z[..., k, :] * Z[..., m, :]).mT  # (..., pairs of rows, pairs of columns)
    H = halves[..., pair_ab[:, None, :, None], pair_km[None, :, None, :]]  # (..., a, k, b, m)
    H = H.flatten(-2).flatten(-3, -2)
    if not (isinstance(coupling, float) and coupling == 0):
        g = (delta @ Z.mT).flatten(-2)
        H = H + _per_run(coupling) * (g.unsqueeze(-1) * g.unsqueeze(-2))
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    return H + 2 * _per_run(ridge) * eye


def _pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pairs a <= b, ``(2, P)``, and the number of the pair {a, b} at every (a, b)."""
    pairs = torch.triu_indices(size, size, device=device)
    number = torch.empty(size, size, dtype=torch.int64, device=device)
    number[pairs[0], pairs[1]] = number[pairs[1], pairs[0]] = torch.arange(pairs.shape[1], device=device)
    return pairs, number


def _deltas_down_to(j: int, weights, layers, Y, loss, activations) -> list[Tensor]:
    """:math:`\\Delta_j, \\dots, \\Delta_J`."""
    J = len(weights)
    found: list[Tensor] = []
    for i in range(J, j - 1, -1):
        Z = layers[i - 1][1]
        pulled = loss.gradient(Z, Y) if i == J else weights[i].mT @ found[0]
        found.insert(0, pulled * activations[i - 1].slope_at_output(Z))
    return found


def as_activations(activation: Activation | Sequence[Activation], layers: int) -> list[Activation]:
    if isinstance(activation, Activation):
        return [activation] * layers
    if len(activation) != layers:
        raise ValueError(f"activation must be one, or one for each of the {layers} layers, got {len(activation)}")
    return list(activation)


def ridge_of(ridge: Ridge, j: int, layers: int) -> Tensor | float:
    if isinstance(ridge, (list, tuple)):
        if len(ridge) != layers:
            raise ValueError(f"ridge must be a number, or one for each of the {layers} layers, got {len(ridge)}")
        return ridge[j - 1]
    return ridge


def _per_run(value: Tensor | float) -> Tensor | float:
    return value[..., None, None] if isinstance(value, Tensor) and value.ndim else value


def check_block(j: int, weights: Sequence[Tensor]) -> None:
    if not isinstance(j, int) or not 1 <= j <= len(weights):
        raise ValueError(f"j must be a block between 1 and {len(weights)}, got {j!r}")


def check_widths(weights: Sequence[Tensor], X: Tensor) -> None:
    if not len(weights):
        raise ValueError("weights must hold at least one matrix, got none")
    width = X.shape[-2]
    for j, W in enumerate(weights, start=1):
        if W.ndim < 2 or W.shape[-1] != width:
            raise ValueError(f"weights of layer {j} must have {width} columns, got shape {tuple(W.shape)}")
        width = W.shape[-2]
