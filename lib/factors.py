r"""The factors of a gradient, straight from back-propagation.

The gradient of a fully connected layer is :math:`g = D^\top X` with X the inputs of the layer and D the derivative of the
loss by its outputs, one row a sample. A rule that needs a norm or a factorization of g, not g itself, may work on the
B x B matrices :math:`X X^\top, D D^\top` instead, and g is never formed.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Factors:
    """Captures D and X of the linear layers of a module; their weights get no ``.grad`` any more.

    It is an opt-in: everything else about the module stays (biases get their ``.grad``, the input its gradient)::

        factors = Factors(network)
        optimizer = DSGD(network.parameters(), factors=factors)  # its zero_grad() clears the factors, too

    It serves an ``Ensemble`` as well (D is then ``(S, B, n_out)``, X ``(S, B, n_in)``, or ``(B, n_in)`` if all runs share it).
    A layer that is used several times in a pass, or in several passes before ``clear``, has the factors of all of them,
    one below the other: gradients add up, as in ``.grad``.

    Args:
        module: a module, whose ``nn.Linear`` layers are captured.

    Raises:
        ValueError: if it has no linear layer.
    """

    def __init__(self, module: nn.Module):
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise ValueError("module must have an nn.Linear layer, got none")
        self._pairs = {id(layer.weight): _Pairs() for layer in layers}
        self._handles = [layer.register_forward_hook(self._hook(self._pairs[id(layer.weight)])) for layer in layers]

    @staticmethod
    def _hook(pairs: "_Pairs") -> Callable:
        def attach(layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            bias = layer.bias if layer.bias is not None else output.new_zeros(())
            return _Captured.apply(output.detach(), inputs[0], layer.weight, bias, pairs)

        return attach

    def __contains__(self, weight: Tensor) -> bool:
        return id(weight) in self._pairs

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """D ``(..., B, n_out)`` and X ``(..., B, n_in)`` of a captured weight; None if it took no part in a backward pass."""
        pairs = self._pairs[id(weight)].all
        if len(pairs) < 2:
            return pairs[0] if pairs else None
        deltas, inputs = zip(*pairs, strict=True)
        axes = deltas[0].shape[:-2]
        return torch.cat(deltas, -2), torch.cat([x.expand(*axes, *x.shape[-2:]) for x in inputs], -2)

    def clear(self) -> None:
        """Forget the factors of the last backward pass."""
        for pairs in self._pairs.values():
            pairs.all.clear()

    def remove(self) -> None:
        """Undo the capture: weights get their ``.grad`` again."""
        for handle in self._handles:
            handle.remove()


class _Pairs:
    """Where a layer's factors go. An object of its own, because ``vmap`` would copy a list."""

    def __init__(self):
        self.all: list[tuple[Tensor, Tensor]] = []


class _Captured(torch.autograd.Function):
    """The output of a linear layer, with a backward pass that keeps D and X in place of their product."""

    @staticmethod
    def forward(output, inputs, weight, bias, pairs):
        return output.view_as(output)

    @staticmethod
    def setup_context(ctx, arguments, _):
        _, inputs, weight, bias, pairs = arguments
        ctx.save_for_backward(inputs, weight)
        ctx.pairs, ctx.has_bias = pairs, bias.ndim > 0

    @staticmethod
    def backward(ctx, deltas):
        inputs, weight = ctx.saved_tensors
        rows = deltas if deltas.ndim > 1 else deltas[None]
        ctx.pairs.all.append((rows.detach(), inputs.detach() if inputs.ndim > 1 else inputs.detach()[None]))
        to_inputs = deltas @ weight if ctx.needs_input_grad[1] else None
        to_bias = rows.sum(-2) if ctx.has_bias and ctx.needs_input_grad[3] else None
        return None, to_inputs, None, to_bias, None

    @staticmethod
    def vmap(info, in_dims, output, inputs, weight, bias, pairs):
        tensors = [
            tensor if at is None else tensor.movedim(at, 0)
            for tensor, at in zip((output, inputs, weight, bias), in_dims, strict=False)
        ]
        return _Captured.apply(*tensors, pairs), 0
