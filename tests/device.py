"""Proof, on a machine without a GPU, that a training step keeps to its device.

On the meta device whatever needs a value (`.item()`, `bool()`, `.cpu()`, boolean masks) raises by itself. A CPU tensor
as an operand does not: a GPU would have to wait for it, or refuse it. So the step runs under a mode that fails on
every CPU operand and on every CPU result, index tensors and 0-dim tensors included.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LeftTheDevice(AssertionError):
    """A CPU tensor took part in a step that should run on the device."""


class NoCpuTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self._check("operand", function, (args, kwargs))
        result = function(*args, **(kwargs or {}))
        self._check("result", function, result)
        return result

    def _check(self, role, function, tensors):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                raise LeftTheDevice(f"{function} has a CPU {role} of shape {tuple(tensor.shape)}")


def assert_stays_on_device(step: Callable[[], object]) -> None:
    """Run `step`, whose tensors are all on the meta device, and fail if it touches the CPU or wants a value."""
    with NoCpuTensor() as mode:
        step()
    assert mode.operations > 0, "the step did nothing that could be checked"
