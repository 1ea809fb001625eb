"""The papers' networks, as plain modules that start from an explicit generator.

A batch is the first axis of every input. All of them end in logits (or, with one output, in a real number), except
``feedforward``, which ends in an activation.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from lib.normalization import BatchNorm, DiminishingBatchNorm


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
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def mlp(
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    activation: type[nn.Module] = nn.ReLU,
    batch_norm: bool = False,
    eps: float = 1e-3,
    bias: bool = True,
    normalization: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """A fully connected network, batch norm on every layer (the last one included) or on none.

    ``mlp((784, 10), ...)`` is the one-layer network of Cai, Li and Shen, Section 4.2.

    Args:
        sizes: widths from input to output, at least two.
        generator: CPU generator of the Glorot (uniform) weights; biases start at zero.
        activation: class of the nonlinearity between layers.
        batch_norm: whether each layer is followed by a ``BatchNorm``.
        eps: its regularizer.
        bias: whether layers have biases. In front of a ``BatchNorm`` they have no effect, and the theory has none.
        normalization: from a width to a module that follows the activation of each hidden layer, as in equation (4) of
            Ma and Klabjan: ``lambda width: DiminishingBatchNorm(width, alpha)``.

    Returns:
        A module from ``(N, sizes[0])`` to ``(N, sizes[-1])``.

    Raises:
        ValueError: for fewer than two sizes, a size below 1, or a generator that is not on the CPU.
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"sizes must be at least two positive widths, got {tuple(sizes)}")
    layers: list[nn.Module] = []
    for number, (width_in, width_out) in enumerate(pairwise(sizes), start=2):
        layers.append(Linear(width_in, width_out, bias=bias))
        if batch_norm:
            layers.append(BatchNorm(width_out, eps))
        if number < len(sizes):
            layers.append(activation())
            if normalization is not None:
                layers.append(normalization(width_out))
    return _start_glorot(nn.Sequential(*layers), generator)


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
    bias: bool = True,
    normalization: Callable[[int], nn.Module] | None = None,
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
        bias: whether layers have biases, as in ``mlp``.
        normalization: from a width to a module that follows the activation of each layer but the last, as in ``mlp``.

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
        layers.append(nn.Conv2d(count_in, count_out, kernel_size=3, padding=1, bias=bias))
        if batch_norm:
            layers.append(BatchNorm(count_out, eps))
        layers.append(nn.ReLU())
        if normalization is not None:
            layers.append(normalization(count_out))
        layers.append(nn.MaxPool2d(2))
    flat = channels[-1] * (height // 4) * (width // 4)
    sizes = (flat, *hidden_sizes, classes)
    head = mlp(sizes, generator, batch_norm=batch_norm, eps=eps, bias=bias, normalization=normalization)
    return _start_glorot(nn.Sequential(*layers, nn.Flatten(), *head), generator)


def vgg(
    image_shape: tuple[int, int, int],
    generator: torch.Generator,
    *,
    width: int = 64,
    depth: Sequence[int] = (2, 3, 3, 3, 3),
    fc: int = 512,
    classes: int = 10,
    batch_norm: bool = True,
    eps: float = 0.0,
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """The VGG network of Arora, Li and Lyu: stages of convolutions, a pool after each, and two fully connected layers.

    Convolutions are 3 x 3, padded to keep the image size, and 64, 128, 256, 512, 512 wide by stages; pools are 2 x 2.
    Each layer is followed by batch norm and the activation; the last, which makes the logits, by batch norm alone:
    with the ReLU that the paper's text puts there too, logits could not be negative. Layers in front of a batch norm
    have no bias, so that every parameter but the last scales and shifts is in a scale-invariant block (``eps = 0``,
    ReLU).

    Args:
        image_shape: channels, height and width of an image, such as ``(3, 32, 32)``.
        generator: CPU generator of the Glorot (uniform) weights.
        width: channels of the first stage; it doubles from stage to stage, up to eight times.
        depth: number of convolutions in each stage.
        fc: width of the fully connected layer before the last.
        classes: number of outputs.
        batch_norm: whether there are batch norms; without them the layers have biases, which start at zero.
        eps: their regularizer.
        activation: class of the nonlinearity.

    Returns:
        A module from ``(N, *image_shape)`` to ``(N, classes)``.

    Raises:
        ValueError: for an image with fewer pixels than the pools divide it by, a width, depth or number below 1, or a
            generator that is not on the CPU.

    Source: Arora, Li and Lyu, Appendix D.
    """
    colors, height, breadth = image_shape
    stages = len(depth)
    if stages < 1 or min(depth) < 1:
        raise ValueError(f"depth must be at least one positive number of convolutions, got {tuple(depth)}")
    for name, value in (("width", width), ("fc", fc), ("classes", classes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if min(height, breadth) < 2**stages:
        raise ValueError(
            f"image_shape must be at least {2**stages} pixels high and wide, for {stages} pools, "
            f"got {tuple(image_shape)}"
        )

    def finish(layer: nn.Module, features: int) -> list[nn.Module]:
        return [layer, BatchNorm(features, eps), activation()] if batch_norm else [layer, activation()]

    layers: list[nn.Module] = []
    channels = colors
    for stage, count in enumerate(depth):
        features = width * min(2**stage, 8)
        for _ in range(count):
            layers += finish(nn.Conv2d(channels, features, kernel_size=3, padding=1, bias=not batch_norm), features)
            channels = features
        layers.append(nn.MaxPool2d(2))
    flat = channels * (height // 2**stages) * (breadth // 2**stages)
    layers += [nn.Flatten(), *finish(Linear(flat, fc, bias=not batch_norm), fc)]
    layers += finish(Linear(fc, classes, bias=not batch_norm), classes)[:-1]
    return _start_glorot(nn.Sequential(*layers), generator)


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
        if isinstance(layer, (BatchNorm, DiminishingBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d))
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
