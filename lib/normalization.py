"""Batch normalization as the papers define it, for one network and for an ensemble alike.

Layout: the first axis of an input is the batch, the second its features (or channels); an image layer has two more.
Under ``torch.func.vmap`` every run of an ensemble sees that same layout and normalizes by its own batch alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lib import schedules


def batch_norm(inputs: Tensor, weight: Tensor, bias: Tensor, eps: Tensor | float) -> Tensor:
    r"""Normalize every feature by the mean and the biased variance of the batch, then scale and shift it.

    :math:`\gamma (x - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta`, with :math:`\mu, \sigma^2` over the batch
    and over all pixels.

    Unlike ``torch.nn.functional.batch_norm`` it takes :math:`\epsilon = 0`, the theory's case, and an
    :math:`\epsilon` that differs between the runs of an ensemble. With :math:`\epsilon = 0` a constant feature has
    no normalization: its outputs are NaN.

    Args:
        inputs: ``(N, C)`` or ``(N, C, H, W)``.
        weight: the scale :math:`\gamma`, ``(C,)``.
        bias: the shift :math:`\beta`, ``(C,)``.
        eps: regularizer :math:`\epsilon \ge 0` added to the variance.

    Returns:
        A tensor of the shape of ``inputs``.

    Raises:
        ValueError: if ``inputs`` has another number of axes.

    Source: Ioffe and Szegedy (2015), Algorithm 1.
    """
    if inputs.ndim not in (2, 4):
        raise ValueError(f"inputs must have shape (N, C) or (N, C, H, W), got {tuple(inputs.shape)}")
    over = (0,) if inputs.ndim == 2 else (0, 2, 3)
    per_feature = (-1,) if inputs.ndim == 2 else (-1, 1, 1)
    centered = inputs - inputs.mean(over, keepdim=True)
    variance = centered.square().mean(over, keepdim=True)
    factor = weight.view(per_feature) * torch.rsqrt(variance + eps)
    return torch.addcmul(bias.view(per_feature), centered, factor)


def invariant_batch_norm(
    inputs: Tensor, layer_weight: Tensor, weight: Tensor, bias: Tensor, eps: Tensor | float
) -> Tensor:
    r"""Batch norm whose regularizer grows with the layer in front, so that the layer's scale still does not matter.

    For feature k, the output of row or filter :math:`w_k` of the layer,

    .. math:: \gamma_k \frac{z_k - \mu_k}{\sqrt{\sigma_k^2 + \epsilon \|w_k\|^2}} + \beta_k,

    for a fully connected layer :math:`\gamma_k w_k^\top (x - u) / \sqrt{w_k^\top (S + \epsilon I) w_k} + \beta_k`, with
    :math:`u, S` mean and covariance of the layer's inputs: equation (8). The sentence before it has :math:`\|w_k\|` in
    place of the square, which would not be invariant.

    Args:
        inputs: outputs of the layer, ``(N, C)`` or ``(N, C, H, W)``.
        layer_weight: the weight that made them, ``(C, ...)``, one row or filter :math:`w_k` a feature.
        weight: the scale :math:`\gamma`, ``(C,)``.
        bias: the shift :math:`\beta`, ``(C,)``.
        eps: regularizer :math:`\epsilon \ge 0`.

    Returns:
        A tensor of the shape of ``inputs``.

    Raises:
        ValueError: if ``inputs`` has another number of axes, or ``layer_weight`` another number of rows than features.

    Source: Arora, Li and Lyu, equation (8) as corrected.
    """
    if inputs.ndim in (2, 4) and layer_weight.shape[0] != inputs.shape[1]:
        raise ValueError(
            f"layer_weight must have one row for each of {inputs.shape[1]} features, "
            f"got shape {tuple(layer_weight.shape)}"
        )
    squares = layer_weight.flatten(1).square().sum(1)
    return batch_norm(inputs, weight, bias, eps * squares.view((-1,) if inputs.ndim == 2 else (-1, 1, 1)))


class BatchNorm(nn.Module):
    r"""Batch norm on the statistics of the batch at hand, starting from zero mean and unit variance.

    It keeps no running averages, so training and evaluation are the same function (see ``batch_norm``).
    ``eps`` is a buffer: runs of one ensemble may differ in it.

    Args:
        features: number of features or channels :math:`C`.
        eps: regularizer :math:`\epsilon \ge 0` added to the variance; 0 is allowed.

    Raises:
        ValueError: if ``features`` is below 1 or ``eps`` is negative or not finite.
    """

    def __init__(self, features: int, eps: float = 1e-3):
        super().__init__()
        if features < 1:
            raise ValueError(f"features must be at least 1, got {features}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("eps", torch.tensor(float(eps)))

    def forward(self, inputs: Tensor) -> Tensor:
        return batch_norm(inputs, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[-1]}"


class NormalizedLayer(nn.Module):
    r"""A layer followed by ``invariant_batch_norm``: every row or filter of the layer is scale-invariant, for any eps.

    With ``eps > 0`` its *inputs* have a scale that matters again: so has the joint :math:`(\gamma, \beta)` of the
    batch norm in front of it.

    Attributes:
        layer: the layer; a bias of it has no effect.
        weight: the scale :math:`\gamma`, ``(C,)``, starting at one.
        bias: the shift :math:`\beta`, ``(C,)``, starting at zero.
        eps: the regularizer, a buffer: runs of one ensemble may differ in it.

    Args:
        layer: an ``nn.Linear`` or ``nn.Conv2d``.
        eps: regularizer :math:`\epsilon \ge 0`.

    Raises:
        TypeError: if ``layer`` is something else.
        ValueError: if ``eps`` is negative or not finite.

    Source: Arora, Li and Lyu, equation (8) as corrected.
    """

    def __init__(self, layer: nn.Module, eps: float = 0.0):
        super().__init__()
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise TypeError(f"layer must be an nn.Linear or nn.Conv2d, got {type(layer).__name__}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        self.layer = layer
        like = layer.weight.detach()
        self.weight = nn.Parameter(like.new_ones(len(like)))
        self.bias = nn.Parameter(like.new_zeros(len(like)))
        self.register_buffer("eps", like.new_tensor(float(eps)))

    def forward(self, inputs: Tensor) -> Tensor:
        return invariant_batch_norm(self.layer(inputs), self.layer.weight, self.weight, self.bias, self.eps)


class DiminishingBatchNorm(nn.Module):
    r"""Normalization by running averages of the batch statistics, which no gradient passes through.

    In training, batch :math:`m = 1, 2, \dots` with mean :math:`\mu_B` and biased standard deviation :math:`\sigma_B`
    first moves the averages :math:`\lambda = (\mu, \sigma)`, then is normalized by them:

    .. math::
        \lambda_m = \alpha_m (\mu_B, \sigma_B) + (1 - \alpha_m) \lambda_{m-1}, \qquad
        y = \gamma \frac{x - \mu_m}{\sigma_m + \epsilon} + \beta.

    The gradient holds :math:`\lambda_m` fixed, equation (2) of the paper. So :math:`\alpha = 1` has the forward pass of
    batch norm, but not its gradient; ``through=True`` lets the gradient pass through the statistics of the batch. In
    evaluation the input is normalized by :math:`\lambda` as it stands. The averages start at zero mean and unit deviation.

    Unlike ``nn.BatchNorm1d`` it averages the standard deviation, not the variance, adds :math:`\epsilon` to it, and
    normalizes by the averages in training as well. A forward pass in training mode moves them, with or without
    ``no_grad``. The runs of an ``Ensemble`` may differ in ``scale`` and ``exponent``; they share a function.

    Args:
        num_features: number of features or channels :math:`C`.
        alpha: weights :math:`\alpha_m`: a number in [0, 1]; ``schedules.Power(c, p)`` with :math:`c \le 1` for
            :math:`c\, m^{-p}`; or a function from m, a tensor without axes, to a number or tensor in [0, 1].
        eps: regularizer :math:`\epsilon \ge 0` added to the standard deviation.
        through: whether the gradient passes through the statistics of the batch.

    Attributes:
        running_mean, running_std: the averages :math:`\lambda`, ``(C,)``.
        num_batches_tracked: number m of batches so far.

    Args (of a call):
        inputs: ``(N, C)`` or ``(N, C, H, W)``.

    Returns (from a call):
        A tensor of the shape of ``inputs``.

    Raises:
        ValueError: if ``num_features`` is below 1, ``alpha`` or ``eps`` is out of range, or an input has another
            number of axes or features.
        TypeError: if ``alpha`` is none of the above.

    Source: Ma and Klabjan (2017), equations (3) to (5) and Algorithm 1, with batches in place of the whole data set.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float | schedules.Power | Callable[[Tensor], Tensor] = 1.0,
        eps: float = 1e-5,
        *,
        through: bool = False,
    ):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be finite and at least 0, got {eps}")
        self.num_features, self.eps, self.through = num_features, float(eps), through
        self.function = None
        if isinstance(alpha, schedules.Power):
            scale, exponent = alpha.c, alpha.p
        elif isinstance(alpha, schedules.Schedule):
            raise TypeError(f"alpha must be a number, a Power or a function of a tensor, got the schedule {alpha!r}")
        elif isinstance(alpha, (int, float)):
            scale, exponent = alpha, 0.0
        elif callable(alpha):
            scale, exponent, self.function = 1.0, 0.0, alpha
        else:
            raise TypeError(f"alpha must be a number, a Power or a function of a tensor, got {alpha!r}")
        if not 0 <= scale <= 1:
            raise ValueError(f"alpha must lie between 0 and 1 for every batch, got {alpha!r}")
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_std", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("exponent", torch.tensor(float(exponent)))

    def alpha(self, m: Tensor) -> Tensor | float:
        r"""The weight :math:`\alpha_m` of batch ``m``, a tensor without axes."""
        return self.scale * m.pow(-self.exponent) if self.function is None else self.function(m)

    def forward(self, inputs: Tensor) -> Tensor:
        over, per_feature = self._axes(inputs)
        mean, std = (
            self._averages(inputs, over, per_feature) if self.training else (self.running_mean, self.running_std)
        )
        gain = self.weight / (std + self.eps)
        return torch.addcmul((self.bias - gain * mean).view(per_feature), inputs, gain.view(per_feature))

    def _axes(self, inputs: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if inputs.ndim not in (2, 4) or inputs.shape[1] != self.num_features:
            expected = f"(N, {self.num_features}) or (N, {self.num_features}, H, W)"
            raise ValueError(f"inputs must have shape {expected}, got {tuple(inputs.shape)}")
        return ((0,), (-1,)) if inputs.ndim == 2 else ((0, 2, 3), (-1, 1, 1))

    def _averages(self, inputs: Tensor, over: tuple[int, ...], per_feature: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(self.through and torch.is_grad_enabled()):
            mean = inputs.mean(over)
            variance = (inputs - mean.view(per_feature)).square().mean(over)
            std = _deviation(variance) if self.through else variance.sqrt()
            alpha = self.alpha((self.num_batches_tracked + 1).to(inputs.dtype))
            mean = self.running_mean + alpha * (mean - self.running_mean)
            std = self.running_std + alpha * (std - self.running_std)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.copy_(mean)
            self.running_std.copy_(std)
        return mean, std

    def extra_repr(self) -> str:
        settings = f"{self.num_features}, eps={self.eps:g}, through={self.through}"
        return settings if self.function is None else f"{settings}, alpha={self.function!r}"


class BatchRenorm(DiminishingBatchNorm):
    r"""Batch renormalization: the forward pass of ``DiminishingBatchNorm``, the gradient of batch norm.

    With mean :math:`\mu_B` and deviation :math:`\sigma_B` of the batch, and the averages :math:`\mu, \sigma` after
    their update,

    .. math::
        y = \gamma \Big(\frac{x - \mu_B}{\sigma_B + \epsilon}\, r + d\Big) + \beta, \qquad
        r = \frac{\sigma_B + \epsilon}{\sigma + \epsilon}, \quad d = \frac{\mu_B - \mu}{\sigma + \epsilon},

    where r and d are constants for the gradient, which passes through :math:`\mu_B, \sigma_B`. r is clipped to
    :math:`[1/r_{max}, r_{max}]` and d to :math:`[-d_{max}, d_{max}]`; over the first ``ramp`` batches the limits grow
    linearly from 1 and 0, which is batch norm, to ``r_max`` and ``d_max``. In evaluation it is a ``DiminishingBatchNorm``.

    Args:
        num_features: number of features or channels :math:`C`.
        alpha: weight of a batch in the averages, as in ``DiminishingBatchNorm``.
        eps: regularizer :math:`\epsilon \ge 0` added to the standard deviation.
        r_max: limit of r.
        d_max: limit of d.
        ramp: number of batches over which the limits grow.

    Raises:
        ValueError: as ``DiminishingBatchNorm``; if ``r_max`` is below 1, ``d_max`` below 0, or ``ramp`` below 1.

    Source: Ioffe (2017), Algorithm 1, with the deviation averaged in place of the variance.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float | schedules.Power | Callable[[Tensor], Tensor] = 0.01,
        eps: float = 1e-5,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        ramp: int = 1,
    ):
        super().__init__(num_features, alpha, eps)
        for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0), ("ramp", ramp, 1)):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.r_max, self.d_max = r_max, d_max
        self.register_buffer("ramp", torch.tensor(float(ramp)))

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return super().forward(inputs)
        over, per_feature = self._axes(inputs)
        mu, sigma = self._averages(inputs, over, per_feature)
        mean = inputs.mean(over)
        centered = inputs - mean.view(per_feature)
        std = _deviation(centered.square().mean(over)) + self.eps
        share = (self.num_batches_tracked / self.ramp).clamp(max=1)
        r_max, d_max = 1 + (self.r_max - 1) * share, self.d_max * share
        r = (std / (sigma + self.eps)).detach().clamp(min=1 / r_max, max=r_max)
        d = ((mean - mu) / (sigma + self.eps)).detach().clamp(min=-d_max, max=d_max)
        gain, offset = self.weight * r / std, self.bias + self.weight * d
        return torch.addcmul(offset.view(per_feature), centered, gain.view(per_feature))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r_max={self.r_max:g}, d_max={self.d_max:g}"


def _deviation(variance: Tensor) -> Tensor:
    """The root of a variance; where that is zero its derivative does not exist and is taken to be zero."""
    positive = variance > 0
    return torch.where(positive, variance, 1.0).sqrt() * positive


@torch.no_grad()
def recompute_statistics(module: nn.Module, inputs: Tensor) -> None:
    r"""Set :math:`\lambda` of every ``DiminishingBatchNorm`` to the statistics of all ``inputs``, in place.

    One forward pass over all of them as a single batch with :math:`\alpha = 1`: each layer is set, and normalizes by, the
    mean and biased deviation of its input, for the parameters as they are. Parameters, :math:`\alpha` and the number of
    batches stay as they were. Other modules that act differently in training are in evaluation mode meanwhile.

    Args:
        module: a network, or an ``Ensemble`` of them.
        inputs: as ``module`` takes them; the activations of one pass must fit in memory.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, DiminishingBatchNorm)]
    modes = [(each, each.training) for each in module.modules()]
    before = [(layer, layer.num_batches_tracked.clone(), layer.function) for layer in layers]
    settings = [(layer, layer.scale.clone(), layer.exponent.clone()) for layer in layers]
    module.eval()
    try:
        for layer in layers:
            layer.train()
            layer.function = None
            layer.scale.fill_(1)
            layer.exponent.zero_()
        module(inputs)
    finally:
        for layer, scale, exponent in settings:
            layer.scale.copy_(scale)
            layer.exponent.copy_(exponent)
        for layer, count, function in before:
            layer.num_batches_tracked.copy_(count)
            layer.function = function
        for each, training in modes:
            each.training = training
