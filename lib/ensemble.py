"""A sweep is an ensemble: S copies of one module, trained at once.

Every parameter and buffer of the module gets a leading axis of length S, the run axis. Nothing else about it changes:
it keeps its name, it is a leaf, an optimizer that works on trailing dimensions updates it. Because run s enters only
the loss of run s, the gradient of the *sum* of the S losses is the S separate gradients.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

Loss = Callable[[Tensor, Tensor], Tensor]


def _with_tensors(module: nn.Module, change: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A copy of ``module`` with each parameter and buffer replaced; the old values are not copied on the way."""
    memo = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        new = change(name, tensor.detach())
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
    return copy.deepcopy(module, memo)


class Ensemble(nn.Module):
    """S independent copies of a module as one module with stacked parameters.

    A run's trajectory does not depend on which other runs share its ensemble.

    Attributes:
        copies: the module, with every parameter and buffer stacked along a leading axis of length S.
        runs: the number of each run in the ensemble it was selected from, ``(S,)``; use it to pick per-run settings.

    Args:
        modules: S modules of equal structure. Only parameters and buffers may differ between them.

    Raises:
        ValueError: if there is no module, or if one is built differently from the first.

    Source: ``torch.func.stack_module_state``, ``torch.func.vmap``.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        super().__init__()
        if not modules:
            raise ValueError("modules must hold at least one module, got none")
        for s, module in enumerate(modules):
            # A setting that is a plain attribute (an eps, a slope) is taken from the first module for all.
            if repr(module) != repr(modules[0]) or module.training != modules[0].training:
                raise ValueError(f"modules must be built alike, got {module} as number {s} and {modules[0]} first")
        parameters, buffers = stack_module_state(list(modules))
        stacked = {name: tensor.detach() for name, tensor in (parameters | buffers).items()}
        self.copies = _with_tensors(modules[0], lambda name, _: stacked[name])
        device = next(iter(stacked.values())).device if stacked else None
        self.register_buffer("runs", torch.arange(len(modules), device=device), persistent=False)

    def __len__(self) -> int:
        return len(self.runs)

    def _map(self, function: Callable, inputs: tuple[Tensor, ...], per_run: bool) -> Tensor:
        def one_run(parameters, buffers, *tensors):
            return function(lambda x: functional_call(self.copies, (parameters, buffers), (x,)), *tensors)

        shared = 0 if per_run else None
        return vmap(one_run, in_dims=(0, 0, *(shared for _ in inputs)))(
            dict(self.copies.named_parameters()), dict(self.copies.named_buffers()), *inputs
        )

    def forward(self, inputs: Tensor, *, per_run: bool = False) -> Tensor:
        """The outputs of all runs.

        Args:
            inputs: one batch ``(N, ...)`` for all runs, or ``(S, N, ...)`` with ``per_run``.
            per_run: whether ``inputs`` has a leading run axis.

        Returns:
            ``(S, N, ...)``.
        """
        return self._map(lambda module, x: module(x), (inputs,), per_run)

    def losses(self, loss: Loss, inputs: Tensor, targets: Tensor, *, per_run: bool = False) -> Tensor:
        """The loss of every run; ``losses(...).sum().backward()`` leaves each run its own gradient.

        Args:
            loss: from the outputs of one run and its targets to a scalar, written for a single network.
            inputs: one batch ``(N, ...)`` for all runs, or ``(S, N, ...)`` with ``per_run``.
            targets: ``(N, ...)``, or ``(S, N, ...)`` with ``per_run``.
            per_run: whether ``inputs`` and ``targets`` have a leading run axis.

        Returns:
            ``(S,)``.
        """
        return self._map(lambda module, x, y: loss(module(x), y), (inputs, targets), per_run)

    def module(self, s: int) -> nn.Module:
        """Run ``s`` as an ordinary module of its own: a copy, which no longer follows the ensemble.

        Raises:
            IndexError: if there is no such run.
        """
        if not 0 <= s < len(self):
            raise IndexError(f"s must be between 0 and {len(self) - 1}, got {s}")
        return _with_tensors(self.copies, lambda _, tensor: tensor[s].clone())

    def select(self, index: Tensor) -> "Ensemble":
        """A smaller ensemble of the runs at ``index``: copies, which train on their own.

        Args:
            index: positions in this ensemble, ``(R,)`` integers.

        Returns:
            An ensemble of R runs whose ``runs`` tell where they come from.
        """
        return _with_tensors(self, lambda _, tensor: tensor.index_select(0, index))

    def put(self, index: Tensor, part: "Ensemble") -> None:
        """Write the runs of ``part``, in place, to the positions ``index`` of this ensemble (undoes ``select``)."""
        with torch.no_grad():
            for mine, new in zip(self.state_dict().values(), part.state_dict().values(), strict=True):
                mine.index_copy_(0, index, new)

    def extra_repr(self) -> str:
        return f"{len(self)} runs of"
