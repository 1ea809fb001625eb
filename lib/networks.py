"""The papers' networks, as plain modules that start from an explicit generator.

A batch is the first axis of every input. All of them end in logits (or, with one output, in a real number), except
``feedforward``, which ends in an activation.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lib.normalization import BatchNorm


class Linear(nn.Linear):
    """A fully connected layer whose activations are stored with the batch innermost.

    It is ``nn.Linear``, parameters and function alike. Written as :math:`W X^T`, with the transposed view handed on, the
    copies in an ensemble become one batched product that needs no transposed copy, forward or backward: a sweep of
    small networks takes about half the time (``benchmarks/ensemble.py``).

    Args (of a call):
        inputs: ``(N, in_features)``.

    Returns (from a call):
        ``(N, out_features)``.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(self.weight, inputs.mT).mT
        return torch.addmm(self.bias[:, None], self.weight, inputs.mT).mT


def _check_generator(generator: torch.Generator) -> None:
    if generator.device.type != "cpu":
        raise ValueError(f"generator must be on the CPU, got {generator.device}: a seed means the same on every device")


def _start_glorot(module: nn.Module, generator: torch.Generator) -> nn.Module:
    _check_generator(generator)
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    return module


def mlp(
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    activation: type[nn.Module] = nn.ReLU,
    batch_norm: bool = False,
    eps: float = 1e-3,
) -> nn.Sequential:
    """A fully connected network, batch norm on every layer (the last one included) or on none.

    ``mlp((784, 10), ...)`` is the one-layer network of Cai, Li and Shen, Section 4.2.

    Args:
        sizes: widths from input to output, at least two.
        generator: CPU generator of the Glorot (uniform) weights; biases start at zero.
        activation: class of the nonlinearity between layers.
        batch_norm: whether each layer is followed by a ``BatchNorm``.
        eps: its regularizer.

    Returns:
        A module from ``(N, sizes[0])`` to ``(N, sizes[-1])``.

    Raises:
        ValueError: for fewer than two sizes, a size below 1, or a generator that is not on the CPU.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two positive widths, got {tuple(sizes)}")
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers.append(Linear(width_in, width_out))
        if batch_norm:
            layers.append(BatchNorm(width_out, eps))
        layers.append(activation())
    return _start_glorot(nn.Sequential(*layers[:-1]), generator)


def feedforward(
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    activation: type[nn.Module] = nn.Sigmoid,
    start: str = "uniform",
) -> nn.Sequential:
    r"""A network without biases whose every layer, the last one too, ends in the activation.

    :math:`y^k = \sigma(w_k y^{k-1})` with :math:`y^0 = x`: equation (21) of Flynn, and equation (1) of Ghauch et al.

    Args:
        sizes: widths :math:`n_0, \dots, n_K` from input to output, at least two.
        generator: CPU generator of the weights.
        activation: class of the nonlinearity; ``nn.Identity`` gives a deep linear network.
        start: "uniform" draws every weight from [-1, 1] (Flynn), "glorot" from a normal distribution of variance
            :math:`2 / (n_{k-1} + n_k)`.

    Returns:
        A module from ``(N, sizes[0])`` to ``(N, sizes[-1])``; its parameters are the K weight matrices in order.

    Raises:
        ValueError: for fewer than two sizes, a size below 1, an unknown ``start``, or a generator that is not on the CPU.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two positive widths, got {tuple(sizes)}")
    if start not in ("uniform", "glorot"):
        raise ValueError(f"start must be 'uniform' or 'glorot', got {start!r}")
    _check_generator(generator)
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layer = Linear(width_in, width_out, bias=False)
        if start == "uniform":
            nn.init.uniform_(layer.weight, -1.0, 1.0, generator=generator)
        else:
            nn.init.xavier_normal_(layer.weight, generator=generator)
        layers += [layer, activation()]
    return nn.Sequential(*layers)


def conv_net(
    image_shape: tuple[int, int, int],
    hidden_sizes: Sequence[int],
    generator: torch.Generator,
    *,
    channels: tuple[int, int] = (8, 16),
    classes: int = 10,
    batch_norm: bool = False,
    eps: float = 1e-3,
) -> nn.Sequential:
    """Conv-MaxPool-Conv-MaxPool, then fully connected layers, all with ReLU between.

    One hidden size gives the 2CNN+2FC network of Cai, Li and Shen, Section 4.2, two give 2CNN+3FC. The paper does not
    state kernels and widths; here kernels are 3 x 3, padded to keep the image size, and pools are 2 x 2.

    Args:
        image_shape: channels, height and width of an image, such as ``(1, 28, 28)``.
        hidden_sizes: widths of the fully connected layers before the last.
        generator: CPU generator of the Glorot (uniform) weights; biases start at zero.
        channels: output channels of the two convolutions.
        classes: number of outputs.
        batch_norm: whether every layer, the last one included, is followed by a ``BatchNorm``.
        eps: its regularizer.

    Returns:
        A module from ``(N, *image_shape)`` to ``(N, classes)``.

    Raises:
        ValueError: for an image below 4 x 4, a width below 1, or a generator that is not on the CPU.
    """
    colors, height, width = image_shape
    if min(height, width) < 4:
        raise ValueError(f"image_shape must be at least 4 pixels high and wide, got {tuple(image_shape)}")
    layers: list[nn.Module] = []
    for count_in, count_out in pairwise((colors, *channels)):
        layers.append(nn.Conv2d(count_in, count_out, kernel_size=3, padding=1))
        if batch_norm:
            layers.append(BatchNorm(count_out, eps))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    flat = channels[-1] * (height // 4) * (width // 4)
    head = mlp((flat, *hidden_sizes, classes), generator, batch_norm=batch_norm, eps=eps)
    return _start_glorot(nn.Sequential(*layers, nn.Flatten(), *head), generator)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a module in two groups: weights and biases, and the scales and shifts of batch norm.

    It serves an ``Ensemble`` as well, whose parameters are stacked.

    Args:
        module: any module.

    Returns:
        ``(weights, normalization)``, each in the order of ``module.parameters()``.
    """
    normalization = [
        parameter
        for layer in module.modules()
        if isinstance(layer, (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d))
        for parameter in layer.parameters()
    ]
    scales_and_shifts = {id(parameter) for parameter in normalization}
    weights = [parameter for parameter in module.parameters() if id(parameter) not in scales_and_shifts]
    return weights, normalization


def softmax_mean_square(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Mean over batch and classes of the squared error between softmax probabilities and one-hot labels.

    :math:`\frac{1}{NK} \sum_{n,k} (\mathrm{softmax}(z_n)_k - [k = y_n])^2`, the loss of Cai, Li and Shen's one-layer network.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)`` integers in :math:`0, \dots, K - 1`.

    Returns:
        A scalar.
    """
    # ``F.one_hot`` looks for the largest label, which on a GPU waits for the device.
    classes = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = (labels[..., None] == classes).to(logits.dtype)
    return (logits.softmax(-1) - one_hot).square().mean()
