r"""The losses of Appendix B of Ghauch et al., with their gradients and curvatures, corrected where chapter 4 corrects them.

Outputs ``H`` are ``(..., d, N)`` and targets ``Y`` ``(d, N)`` or ``(..., d, N)``: columns are samples, leading dimensions
are runs. A loss averages over the :math:`N` samples, so its gradient carries the :math:`1/N`, as equation (A.6) wants it.

The second derivative of a loss with respect to all of ``H`` is

.. math:: \mathrm{blockdiag}(C_1, \dots, C_N) + \kappa\, \nabla\ell\, \nabla\ell^T,

with :math:`C_n` from ``curvature`` and :math:`\kappa` from ``coupling``: zero for an average over samples, not for the
exponential loss, whose samples meet inside the exponential.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class _Loss:
    """What the losses share: an average over samples has no coupling, and outputs must fit targets."""

    def value(self, H: Tensor, Y: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, H: Tensor, Y: Tensor) -> Tensor:
        raise NotImplementedError

    def curvature(self, H: Tensor, Y: Tensor) -> Tensor:
        raise NotImplementedError

    def coupling(self, H: Tensor, Y: Tensor) -> Tensor | float:
        r""":math:`\kappa` of the module's formula: a number, or ``(...)``."""
        return 0.0

    def check_targets(self, Y: Tensor) -> None:
        """Raise ``ValueError`` for targets the loss is not made for. It reads values: call it once, before training."""
        _check_values(Y, Y.isfinite(), "finite")


@dataclass(frozen=True)
class Squared(_Loss):
    r"""The squared loss (16), :math:`\ell = \frac1N \|Y - H\|_F^2`, with gradient :math:`\frac2N (H - Y)` (A.11)."""

    def value(self, H: Tensor, Y: Tensor) -> Tensor:
        """``(...)``."""
        rest = _difference(H, Y).flatten(-2)
        return torch.linalg.vecdot(rest, rest) / H.shape[-1]

    def gradient(self, H: Tensor, Y: Tensor) -> Tensor:
        """Like ``H``."""
        return _difference(H, Y) * (2 / H.shape[-1])

    def curvature(self, H: Tensor, Y: Tensor) -> Tensor:
        r""":math:`C_n = \frac2N I`; ``(..., N, d, d)``."""
        return torch.diag_embed(torch.full_like(H, 2 / H.shape[-1]).mT)


@dataclass(frozen=True)
class Exponential(_Loss):
    r"""The exponential loss (A.12), :math:`\ell = c\, e^{q/c}` with :math:`q = \frac1N \|Y - H\|_F^2`.

    The gradient is :math:`\frac2N (H - Y)\, e^{q/c}`; (A.13) as printed lacks :math:`1/N` twice. The second derivative is
    :math:`\frac2N e^{q/c} I + \frac1c e^{q/c} \nabla q \nabla q^T`, and the last term is :math:`\nabla\ell\nabla\ell^T / \ell`.

    Args:
        c: positive; :math:`\ell - c \to q` for :math:`c \to \infty`.

    Raises:
        ValueError: if ``c`` is not positive and finite.
    """

    c: float

    def __post_init__(self):
        _check_positive("c", self.c)

    def value(self, H: Tensor, Y: Tensor) -> Tensor:
        """``(...)``."""
        return self.c * self._factor(H, Y)

    def gradient(self, H: Tensor, Y: Tensor) -> Tensor:
        """Like ``H``."""
        return _difference(H, Y) * (2 / H.shape[-1] * self._factor(H, Y)[..., None, None])

    def curvature(self, H: Tensor, Y: Tensor) -> Tensor:
        r""":math:`C_n = \frac2N e^{q/c} I`; ``(..., N, d, d)``."""
        diagonal = torch.ones_like(H) * (2 / H.shape[-1] * self._factor(H, Y)[..., None, None])
        return torch.diag_embed(diagonal.mT)

    def coupling(self, H: Tensor, Y: Tensor) -> Tensor:
        r""":math:`\kappa = 1/\ell`; ``(...)``."""
        return 1 / self.value(H, Y)

    def _factor(self, H: Tensor, Y: Tensor) -> Tensor:
        return torch.exp(_difference(H, Y).square().sum((-2, -1)) / (self.c * H.shape[-1]))


@dataclass(frozen=True)
class CrossEntropy(_Loss):
    r"""Cross-entropy (A.14), :math:`\ell = -\frac1N \sum_{i,n} [y \log h + (1 - y) \log(1 - h)]`, for outputs in (0, 1).

    The gradient is :math:`\frac1N [-y/h + (1-y)/(1-h)]`; (A.15) as printed has a factor :math:`h` too many. A term whose
    factor :math:`y` or :math:`1-y` is zero is zero, also at :math:`h = 0` or 1. Targets in [0, 1].
    """

    def value(self, H: Tensor, Y: Tensor) -> Tensor:
        """``(...)``; infinite for a wrong output of exactly 0 or 1."""
        _check_shapes(H, Y)
        return -(torch.special.xlogy(Y, H) + torch.special.xlog1py(1 - Y, -H)).sum((-2, -1)) / H.shape[-1]

    def gradient(self, H: Tensor, Y: Tensor) -> Tensor:
        """Like ``H``."""
        _check_shapes(H, Y)
        return (_ratio(1 - Y, 1 - H) - _ratio(Y, H)) / H.shape[-1]

    def curvature(self, H: Tensor, Y: Tensor) -> Tensor:
        r""":math:`C_n = \frac1N \mathrm{diag}(y/h^2 + (1-y)/(1-h)^2)`; ``(..., N, d, d)``."""
        _check_shapes(H, Y)
        return torch.diag_embed(((_ratio(Y, H.square()) + _ratio(1 - Y, (1 - H).square())) / H.shape[-1]).mT)

    def check_targets(self, Y: Tensor) -> None:
        """Raise ``ValueError`` unless all targets are in [0, 1]."""
        _check_values(Y, (Y >= 0) & (Y <= 1), "in [0, 1]")


@dataclass(frozen=True)
class SquaredHinge(_Loss):
    r"""The squared hinge loss (A.17), :math:`\ell = \frac1{2cN} \sum_{i,n} (1 - yh)_+^2`, for targets :math:`\pm1`.

    The paper gives no gradient; it is :math:`-\frac1{cN} y (1 - yh)_+`. The second derivative jumps at :math:`yh = 1`,
    where ``curvature`` takes the side of zero.

    Args:
        c: positive.

    Raises:
        ValueError: if ``c`` is not positive and finite.
    """

    c: float

    def __post_init__(self):
        _check_positive("c", self.c)

    def value(self, H: Tensor, Y: Tensor) -> Tensor:
        """``(...)``."""
        _check_shapes(H, Y)
        return (1 - Y * H).clamp(min=0).square().sum((-2, -1)) / (2 * self.c * H.shape[-1])

    def gradient(self, H: Tensor, Y: Tensor) -> Tensor:
        """Like ``H``."""
        _check_shapes(H, Y)
        return Y * (1 - Y * H).clamp(min=0) * (-1 / (self.c * H.shape[-1]))

    def curvature(self, H: Tensor, Y: Tensor) -> Tensor:
        r""":math:`C_n = \frac1{cN} \mathrm{diag}(y^2 [yh < 1])`; ``(..., N, d, d)``."""
        _check_shapes(H, Y)
        return torch.diag_embed((Y.square() * (Y * H < 1) / (self.c * H.shape[-1])).mT)

    def check_targets(self, Y: Tensor) -> None:
        """Raise ``ValueError`` unless all targets are -1 or 1."""
        _check_values(Y, Y.abs() == 1, "-1 or 1")


@dataclass(frozen=True)
class Logistic(_Loss):
    r"""The logistic loss (A.18), :math:`\ell = \frac1N \sum_n \log(1 + e^{-y_n^T h_n})`, for targets :math:`\pm1`.

    The paper gives no gradient; its column n is :math:`-\frac1N y_n\, \sigma(-y_n^T h_n)` with :math:`\sigma` the logistic
    function.
    """

    def value(self, H: Tensor, Y: Tensor) -> Tensor:
        """``(...)``."""
        return -torch.nn.functional.logsigmoid(self._margin(H, Y)).sum((-2, -1)) / H.shape[-1]

    def gradient(self, H: Tensor, Y: Tensor) -> Tensor:
        """Like ``H``."""
        return Y * torch.sigmoid(-self._margin(H, Y)) * (-1 / H.shape[-1])

    def curvature(self, H: Tensor, Y: Tensor) -> Tensor:
        r""":math:`C_n = \frac1N \sigma(m)\sigma(-m)\, y_n y_n^T` with :math:`m = y_n^T h_n`; ``(..., N, d, d)``."""
        margin = self._margin(H, Y)
        y = Y.mT
        weight = torch.sigmoid(margin) * torch.sigmoid(-margin) / H.shape[-1]
        return weight.mT.unsqueeze(-1) * (y.unsqueeze(-1) * y.unsqueeze(-2))

    def check_targets(self, Y: Tensor) -> None:
        """Raise ``ValueError`` unless all targets are -1 or 1."""
        _check_values(Y, Y.abs() == 1, "-1 or 1")

    def _margin(self, H: Tensor, Y: Tensor) -> Tensor:
        _check_shapes(H, Y)
        return (Y * H).sum(-2, keepdim=True)


def _difference(H: Tensor, Y: Tensor) -> Tensor:
    _check_shapes(H, Y)
    return H - Y


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where the numerator is."""
    return (numerator / denominator).masked_fill(numerator == 0, 0.0)


def _check_shapes(H: Tensor, Y: Tensor) -> None:
    if H.ndim < 2 or H.shape[-2:] != Y.shape[-2:]:
        raise ValueError(
            f"Y must have the rows and columns of H, {tuple(H.shape[-2:])} (outputs, samples), got {tuple(Y.shape)}"
        )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def _check_values(Y: Tensor, good: Tensor, allowed: str) -> None:
    if not Y.is_meta and not bool(good.all()):
        raise ValueError(f"Y must be {allowed}, got {Y[~good].flatten()[:3].tolist()}")
