"""Batch normalization as the papers define it, for one network and for an ensemble alike.

Layout: the first axis of an input is the batch, the second its features (or channels); an image layer has two more.
Under ``torch.func.vmap`` every run of an ensemble sees that same layout and normalizes by its own batch alone.
"""

import torch
from torch import Tensor, nn


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
