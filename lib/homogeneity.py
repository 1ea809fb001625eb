r"""How a positive factor on some parameters spreads through a network.

The network is traced with ``torch.fx``. A candidate block of parameters is multiplied by a factor, and the factor is
followed from node to node. A value that it reaches is

- unchanged (None), or
- ``Scaled``: multiplied by positive factors along the channels, up to an addend that is not multiplied (a bias), or
- ``Unknown``, which is the answer for every operation without a rule.

A normalization without smoothing takes away the factors that are constant over what it normalizes.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lib import networks
from lib.normalization import BatchNorm, NormalizedLayer, batch_norm, invariant_batch_norm

SMALL_EPS = 1e-2  # what ``trust_eps`` lets pass

# ------------------------------------------------------------------------------------------------------------ tracing

BATCH_NORMS = (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Classes with a rule. A subclass counts if it has not written a forward of its own.
RULED = (
    *BATCH_NORMS,
    *INSTANCE_NORMS,
    *CONVOLUTIONS,
    *TRANSPOSED,
    nn.Linear,
    networks.Linear,
    NormalizedLayer,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def is_plainly(module: nn.Module, classes: type | tuple[type, ...]) -> bool:
    """Whether a module belongs to the classes and computes what they compute."""
    classes = classes if isinstance(classes, tuple) else (classes,)
    return any(isinstance(module, c) and type(module).forward is c.forward for c in classes)


class _Proxy(fx.Proxy):
    """A stand-in whose augmented assignments are recorded: torch.fx takes ``x += y`` for ``x = x + y``."""

    def __iadd__(self, other):
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other):
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other):
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other):
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    def __init__(self):
        super().__init__(autowrap_functions=(batch_norm, invariant_batch_norm))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = type(module).__module__ == "lib.normalization"
        return ours or is_plainly(module, RULED) or super().is_leaf_module(module, name)


def trace(module: nn.Module) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """The graph of a module, and its modules by name; a module that is one operation gets a graph of one node."""
    tracer = _Tracer()
    try:
        if tracer.is_leaf_module(module, ""):
            module = nn.Sequential(module)
        return tracer.trace(module), dict(module.named_modules(remove_duplicate=False))
    except Exception as error:  # whatever the forward of the module does with a stand-in for a tensor
        raise ValueError(
            f"module must have a forward that torch.fx can trace, {type(module).__name__} has not: "
            f"{type(error).__name__}: {error}"
        ) from error


# -------------------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Scaled:
    """Multiplied by positive factors, along the axis ``axis`` (counted from the end; None if it is not known).

    ``groups`` is 1 for one factor, k for one on each of k equal contiguous pieces of the axis, 0 for any on each
    channel. With ``shift``, an addend that depends on the position along the axis alone is not multiplied.
    """

    groups: int
    axis: int | None = None
    shift: bool = False

    @property
    def plain(self) -> bool:
        return self.groups == 1 and not self.shift


@dataclass(frozen=True)
class Unknown:
    reason: str


SAME = None  # unchanged
State = Scaled | Unknown | None

# Elementwise and positively homogeneous: positive factors pass through, an addend does not.
HOMOGENEOUS_MODULES = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU)
HOMOGENEOUS = {
    F.relu,
    F.relu_,
    torch.relu,
    torch.relu_,
    F.leaky_relu,
    F.leaky_relu_,
    F.prelu,
    torch.prelu,
    torch.abs,
    abs,
}
HOMOGENEOUS_METHODS = {"relu", "relu_", "abs", "abs_", "prelu"}
# Pass on positive factors for each channel, and an addend as well, if they leave the channels alone: axes they act on.
KEEPING_MODULES = {
    **{kind: 1 for kind in (nn.MaxPool1d, nn.AdaptiveMaxPool1d, nn.AdaptiveAvgPool1d)},
    **{kind: 2 for kind in (nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)},
    **{kind: 3 for kind in (nn.MaxPool3d, nn.AdaptiveMaxPool3d, nn.AdaptiveAvgPool3d)},
    **{kind: 1 for kind in (nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d, nn.Upsample)},
    **{kind: 2 for kind in (nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)},
    **{kind: 3 for kind in (nn.ReflectionPad3d, nn.ReplicationPad3d, nn.CircularPad3d)},
    nn.Identity: 0,
}
KEEPING = {
    **{kind: 1 for kind in (F.max_pool1d, torch.max_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d)},
    **{kind: 2 for kind in (F.max_pool2d, torch.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)},
    **{kind: 3 for kind in (F.max_pool3d, torch.max_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d)},
    F.interpolate: 1,
    torch.clone: 0,
}
KEEPING_METHODS = {"contiguous", "clone", "to", "float", "double", "half", "bfloat16", "cpu", "cuda", "type_as"}
AVERAGE_POOLS = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
AVERAGES = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
ZERO_PADS = {nn.ZeroPad1d: 1, nn.ZeroPad2d: 2, nn.ZeroPad3d: 3}
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Linear, but they mix or move channels: one factor passes, nothing else.
MIXING_MODULES = (nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.Fold, nn.Unfold)
MIXING = {torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.reshape, torch.sum, torch.movedim}
MIXING |= {torch.chunk, torch.split, operator.getitem, F.unfold, torch.neg, operator.neg}
MIXING_METHODS = {"transpose", "permute", "squeeze", "unsqueeze", "view", "reshape", "sum", "movedim", "chunk", "split"}
MIXING_METHODS |= {"expand", "repeat", "t", "unflatten", "neg", "__getitem__"}
MEANS = {torch.mean: "mean", torch.amax: "amax"}
ADDITIONS = {operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub}
ADDITION_METHODS = {"add", "add_", "sub", "sub_", "__add__", "__sub__"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, operator.matmul, torch.matmul, torch.mm, torch.bmm}
PRODUCT_METHODS = {"mul", "mul_", "matmul", "mm", "bmm"}
QUOTIENTS = {operator.truediv, operator.itruediv, torch.div}
QUOTIENT_METHODS = {"div", "div_"}
ELEMENTWISE = {operator.mul, operator.imul, torch.mul, *QUOTIENTS}
IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, F.relu_, torch.relu_, F.leaky_relu_}
# Their results may share memory with their first argument.
SHARING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, *DROPOUTS)
SHARING = {torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze, torch.reshape, torch.flatten, torch.movedim}
SHARING |= {torch.chunk, torch.split, operator.getitem, F.dropout, getattr}
SHARING_METHODS = MIXING_METHODS | {"flatten", "contiguous", "to", "float", "double"}
SHAPE_METHODS = {"size", "dim", "numel", "ndimension"}


class LayerParameters(NamedTuple):
    """The parameters of a linear layer: of degree one in the rows of ``scale``, of degree zero in ``direction``.

    ``whole``: the direction is normalized as a whole, not row by row. A bias that is computed from others is None here.
    """

    scale: nn.Parameter | None
    direction: nn.Parameter | None
    whole: bool
    bias: nn.Parameter | None


def layer_parameters(module: nn.Module) -> LayerParameters:
    """The roles of the parameters of a linear layer, weight normalization (new or old style) included."""
    bias = module._parameters.get("bias")
    if parametrize.is_parametrized(module, "weight"):
        chain = module.parametrizations.weight
        if len(chain) == 1 and type(chain[0]).__name__ == "_WeightNorm" and chain[0].dim in (0, -1):
            return LayerParameters(chain.original0, chain.original1, chain[0].dim == -1, bias)
        return LayerParameters(None, None, False, bias)
    hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "WeightNorm"]
    if hooks and hooks[0].name == "weight" and hooks[0].dim in (0, -1):
        return LayerParameters(module.weight_g, module.weight_v, hooks[0].dim == -1, bias)
    return LayerParameters(module._parameters.get("weight"), None, False, bias)


def _hooked(module: nn.Module) -> bool:
    known = [hook for hook in module._forward_pre_hooks.values() if type(hook).__name__ == "WeightNorm"]
    return len(module._forward_pre_hooks) > len(known) or bool(module._forward_hooks)


def _eps(module: nn.Module) -> float:
    if module.eps is None:  # RMSNorm: the machine epsilon
        return torch.finfo(torch.get_default_dtype()).eps
    if isinstance(module.eps, Tensor):
        if module.eps.is_meta:
            raise ValueError("module must have values, its eps is on the meta device")
        return float(module.eps.max())
    return float(module.eps)


class Walk:
    """One candidate block, scaled, followed through the graph.

    Attributes:
        output: the state of the outputs.
        seen: whether the candidate is used at all.
        trusted: names of normalizations whose small eps was neglected.
        mismatches: values that would have to be multiplied too for an addition to be homogeneous.
    """

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module], candidate, groups: int, trust_eps: bool):
        self.modules, self.trust_eps, self.groups = modules, trust_eps, groups
        self.candidate = {id(parameter) for parameter in candidate}
        self.states: dict[fx.Node, State] = {}
        self.trusted: set[str] = set()
        self.mismatches: list[fx.Node] = []
        self.seen = False
        self.output: State = SAME
        for node in graph.nodes:
            state = self._visit(node)
            if self._in_place(node):
                self._written(node.args[0], state)
            self.states[node] = state
            if node.op == "output":
                self.output = state

    # A node

    def _visit(self, node: fx.Node) -> State:
        inputs = [self.states[other] for other in node.all_input_nodes]
        for state in inputs:
            if isinstance(state, Unknown):
                return state
        if node.op == "placeholder":
            return SAME
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "output":
            scaled = [state for state in inputs if state is not SAME]
            return scaled[0] if scaled else SAME
        if node.op == "call_module":
            return self._module(node, self.modules[node.target])
        if all(state is SAME for state in inputs):
            return SAME
        return self._function(node)

    def _attribute(self, node: fx.Node) -> State:
        value = self.modules[""]
        for part in node.target.split("."):
            value = getattr(value, part)
        if id(value) in self.candidate:
            self.seen = True
            return Unknown(f"{node.target} is used outside a layer")
        return SAME

    def _first(self, node: fx.Node) -> State:
        """The state of the first argument, if the others are unchanged."""
        argument = node.args[0] if node.args else node.kwargs.get("input")
        others = [other for other in node.all_input_nodes if other is not argument and self.states[other] is not SAME]
        if not isinstance(argument, fx.Node) or others:
            return self._no_rule(node)
        return self.states[argument]

    def _no_rule(self, node: fx.Node) -> Unknown:
        return Unknown(f"{self._name(node)} is not known to be positively homogeneous")

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[node.target]).__name__})"
        return node.target if isinstance(node.target, str) else node.name

    # Modules

    def _module(self, node: fx.Node, module: nn.Module) -> State:
        ours = {id(parameter) for parameter in module.parameters()} & self.candidate
        self.seen = self.seen or bool(ours)
        state = self._first(node)
        if isinstance(state, Unknown):
            return state
        if state is SAME and not ours:
            return SAME
        if _hooked(module):
            return Unknown(f"{node.target} has hooks")
        if is_plainly(module, (nn.Linear, networks.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            return self._linear(node, module, state, ours)
        if is_plainly(module, NormalizedLayer):
            return self._normalized_layer(node, module, state, ours)
        if is_plainly(module, (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)):
            state = self._normalization(node.target, module, state)
            return self._affine(node, module, state, ours)
        if ours:
            return self._no_rule(node)
        if isinstance(module, HOMOGENEOUS_MODULES):
            return self._without_shift(node, state)
        if type(module) in KEEPING_MODULES and not getattr(module, "return_indices", False):
            return self._beside_channels(node, state, KEEPING_MODULES[type(module)])
        if type(module) in AVERAGE_POOLS:
            pads = module.padding if isinstance(module.padding, tuple) else (module.padding,)
            state = self._without_shift(node, state) if any(pads) or module.ceil_mode else state
            return self._beside_channels(node, state, AVERAGE_POOLS[type(module)])
        if type(module) in ZERO_PADS:
            return self._beside_channels(node, self._without_shift(node, state), ZERO_PADS[type(module)])
        if isinstance(module, DROPOUTS):
            return self._without_shift(node, state) if module.training else state
        if isinstance(module, nn.Flatten):
            return self._flattened(node, state, module.start_dim, module.end_dim)
        if isinstance(module, MIXING_MODULES):
            return self._plain(node, state)
        return self._no_rule(node)

    def _without_shift(self, node: fx.Node, state: Scaled) -> State:
        return Unknown(f"{self._name(node)} meets a bias that is not scaled along") if state.shift else state

    def _plain(self, node: fx.Node, state: Scaled) -> State:
        if state.shift:
            return self._without_shift(node, state)
        return Scaled(1) if state.plain else self._mixed(node)

    def _mixed(self, node: fx.Node) -> Unknown:
        return Unknown(f"{self._name(node)} mixes channels that are scaled differently")

    def _beside_channels(self, node: fx.Node, state: State, axes: int) -> State:
        """The state after an operation on the last ``axes`` axes."""
        if isinstance(state, Unknown) or state.plain or (state.axis is not None and state.axis < -axes) or axes == 0:
            return state
        return self._mixed(node)

    def _flattened(self, node: fx.Node, state: Scaled, start: int, end: int) -> State:
        if (start, end) != (1, -1) or (state.axis is None and not state.plain):
            return self._plain(node, state)
        return Scaled(state.groups, -1, state.shift)

    def _linear(self, node: fx.Node, module: nn.Module, state: State, ours: set[int]) -> State:
        layer, bias = layer_parameters(module), layer_parameters(module).bias
        axis = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)
        if ours:
            if state is not SAME:
                return Unknown(f"{node.target} is scaled together with its input")
            if layer.direction is not None and ours == {id(layer.direction)}:
                return SAME if self.groups == 1 or not layer.whole else self._no_rule(node)
            if bias is not None and ours == {id(bias)}:
                return Scaled(1, axis, shift=True)  # the candidate "addend": is it taken away?
            if layer.scale is None or id(layer.scale) not in ours or not ours <= {id(layer.scale), id(bias)}:
                return self._no_rule(node)
            return Scaled(self.groups, axis, shift=module.bias is not None and id(bias) not in ours)
        if state.groups != 1:
            return self._mixed(node)
        if state.shift and (state.axis != axis or self._pads_zeros(module)):
            return self._without_shift(node, state)
        return Scaled(1, axis, state.shift or module.bias is not None)

    @staticmethod
    def _pads_zeros(module: nn.Module) -> bool:
        if isinstance(module, nn.Linear):
            return False
        padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
        return isinstance(module, TRANSPOSED) or (
            module.padding_mode == "zeros" and padding != ("valid",) and any(padding)
        )

    def _smoothed(self, name: str, module: nn.Module) -> Unknown | None:
        """Why the normalization does not take a factor away, if so."""
        eps = _eps(module)
        if eps == 0:
            return None
        if self.trust_eps and eps <= SMALL_EPS:
            self.trusted.add(f"{name} (eps = {eps:g})")
            return None
        return Unknown(f"{name} has eps = {eps:g}")

    def _normalization(self, name: str, module: nn.Module, state: State) -> State:
        """The state after subtracting the mean and dividing by the standard deviation."""
        if state is SAME:
            return SAME
        if getattr(module, "running_mean", None) is not None and not module.training:
            return Unknown(f"{name} normalizes by running averages (evaluation)")
        smoothed = self._smoothed(name, module)
        if smoothed is not None:
            return smoothed
        if state.plain:
            return SAME
        if isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
            axes = {nn.BatchNorm1d: (-1, -2), nn.BatchNorm2d: (-3,), nn.BatchNorm3d: (-4,), BatchNorm: (-1, -3)}
            axes |= {nn.InstanceNorm1d: (-2,), nn.InstanceNorm2d: (-3,), nn.InstanceNorm3d: (-4,)}
            allowed = next(value for kind, value in axes.items() if isinstance(module, kind))
            return SAME if state.axis in allowed else Unknown(f"{name} normalizes another axis")
        if isinstance(module, nn.GroupNorm) and state.axis is not None:
            alone = module.num_groups == module.num_channels
            if not state.shift and state.groups and module.num_groups % state.groups == 0 or alone:
                return SAME
        if state.shift and state.groups == 1:
            return Unknown(f"{name} keeps a bias that is not scaled along")
        return Unknown(f"{name} normalizes channels together that are scaled differently")

    def _affine(self, node: fx.Node, module: nn.Module, state: State, ours: set[int]) -> State:
        if state is not SAME or not ours:
            return state
        if ours != {id(parameter) for parameter in module.parameters(recurse=False)} or self.groups != 1:
            return self._no_rule(node)
        axes = {nn.BatchNorm2d: -3, nn.BatchNorm3d: -4}
        return Scaled(1, next((axis for kind, axis in axes.items() if isinstance(module, kind)), None))

    def _normalized_layer(self, node: fx.Node, module: NormalizedLayer, state: State, ours: set[int]) -> State:
        inner = {id(parameter) for parameter in module.layer.parameters()}
        if ours & inner:
            layer = layer_parameters(module.layer)
            known = {id(part) for part in layer if isinstance(part, Tensor)}
            if (
                state is not SAME
                or not ours <= known
                or not is_plainly(module.layer, (nn.Linear, networks.Linear, nn.Conv2d))
            ):
                return self._no_rule(node)
            if layer.whole and layer.direction is not None and id(layer.direction) in ours and self.groups != 1:
                return self._no_rule(node)
        elif state is not SAME:
            state = self._linear(node, module.layer, state, set())
            if isinstance(state, Unknown):
                return state
            smoothed = self._smoothed(node.target, module)
            if smoothed is not None:
                return smoothed
        mine = ours - inner
        if not mine:
            return SAME
        if mine != {id(module.weight), id(module.bias)} or self.groups != 1 or ours & inner:
            return self._no_rule(node)
        return Scaled(1)

    # Functions and methods

    def _function(self, node: fx.Node) -> State:
        method = node.op == "call_method"
        target = node.target

        def named(functions: Iterable, methods: Iterable[str]) -> bool:
            return target in methods if method else target in functions

        if named(ADDITIONS, ADDITION_METHODS):
            return self._sum(node)
        if named(PRODUCTS, PRODUCT_METHODS) or named(QUOTIENTS, QUOTIENT_METHODS):
            elementwise = named(ELEMENTWISE, {"mul", "mul_", "div", "div_"})
            return self._product(node, named(QUOTIENTS, QUOTIENT_METHODS), elementwise)
        if named({torch.cat, torch.concat}, ()):
            return self._concatenation(node)
        if named({getattr}, ()) and node.args[1] in ("shape", "ndim", "device", "dtype") or named((), SHAPE_METHODS):
            return SAME
        return self._unary(node, named)

    def _in_place(self, node: fx.Node) -> bool:
        """Whether a node may change its first argument."""
        if node.op == "call_module":
            return bool(getattr(self.modules[node.target], "inplace", False))
        if node.op == "call_method":
            return node.target.endswith("_") and not node.target.endswith("__")
        asked = node.kwargs.get("inplace") or (node.target in HOMOGENEOUS and True in node.args[1:])
        return node.op == "call_function" and bool(node.target in IN_PLACE or asked)

    def _written(self, node: fx.Node, state: State) -> None:
        """After an operation in place: who reads its argument later reads the result; views of it are given up."""
        if state is SAME and self.states[node] is SAME:
            return
        root = self._root(node)
        for other, before in self.states.items():
            kept = before == state and (state is SAME or (isinstance(state, Scaled) and state.plain))
            if self._root(other) is root and not kept:
                self.states[other] = Unknown(f"{node.name} is changed in place")
        self.states[node] = state

    def _root(self, node: fx.Node) -> fx.Node:
        """The value whose memory a node may share."""
        while node.args and isinstance(node.args[0], fx.Node):
            if node.op == "call_module":
                shares = isinstance(self.modules[node.target], SHARING_MODULES)
            else:
                shares = node.target in SHARING or (node.op == "call_method" and node.target in SHARING_METHODS)
            if not shares:
                break
            node = node.args[0]
        return node

    def _unary(self, node: fx.Node, named) -> State:
        state = self._first(node)
        if not isinstance(state, Scaled):
            return state if state is not SAME else self._no_rule(node)
        if named(HOMOGENEOUS, HOMOGENEOUS_METHODS):
            return self._without_shift(node, state)
        if named(KEEPING, KEEPING_METHODS):
            indices = node.kwargs.get("return_indices") or True in node.args[2:]
            axes = KEEPING.get(node.target, 0)
            return self._no_rule(node) if indices else self._beside_channels(node, state, axes)
        if named(AVERAGES, ()):
            simple = len(node.args) <= 3 and not set(node.kwargs) - {"kernel_size", "stride"}
            state = state if simple else self._without_shift(node, state)
            return self._beside_channels(node, state, AVERAGES[node.target])
        if named({F.dropout, torch.dropout}, ()):
            return self._without_shift(node, state)
        if named({F.pad}, ()):
            value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None)
            mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
            if not (mode != "constant" or value in (None, 0)):
                return self._no_rule(node)
            pads = node.kwargs.get("pad", node.args[1] if len(node.args) > 1 else None)
            known = isinstance(pads, (tuple, list))
            state = self._without_shift(node, state)
            return self._beside_channels(node, state, len(pads) // 2) if known else self._plain(node, state)
        if named({torch.clamp, torch.clip}, {"clamp", "clip", "clamp_", "clamp_min"}):
            low = node.kwargs.get("min", node.args[1] if len(node.args) > 1 else None)
            high = node.kwargs.get("max", node.args[2] if len(node.args) > 2 else None)
            zero = all(bound is None or (isinstance(bound, (int, float)) and bound == 0) for bound in (low, high))
            return self._without_shift(node, state) if zero else self._no_rule(node)
        if named({torch.flatten}, {"flatten"}):
            start = node.kwargs.get("start_dim", node.args[1] if len(node.args) > 1 else 0)
            end = node.kwargs.get("end_dim", node.args[2] if len(node.args) > 2 else -1)
            return self._flattened(node, state, start, end)
        if named({torch.reshape}, {"view", "reshape"}) and self._flattens(node):
            return self._flattened(node, state, 1, -1)
        if named({F.linear}, ()) or named({F.conv1d, F.conv2d, F.conv3d, torch.conv2d}, ()):
            return self._functional_linear(node, state)
        if named(MEANS, MEANS.values()):
            return self._mean(node, state)
        if named(MIXING, MIXING_METHODS) or (named({getattr}, ()) and node.args[1] in ("T", "mT")):
            return self._plain(node, state)
        return self._no_rule(node)

    @staticmethod
    def _flattens(node: fx.Node) -> bool:
        """Whether a view is (N, everything else): its sizes are the first size of its input and -1."""
        sizes = node.args[1:] if len(node.args) > 2 else node.args[1] if len(node.args) == 2 else ()
        if (
            not isinstance(sizes, (tuple, list))
            or len(sizes) != 2
            or sizes[1] != -1
            or not isinstance(sizes[0], fx.Node)
        ):
            return False
        size = sizes[0]
        if size.op == "call_method" and size.target == "size":
            return size.args[1:] == (0,)
        return size.target is operator.getitem and size.args[1] == 0

    def _functional_linear(self, node: fx.Node, state: Scaled) -> State:
        if not state.plain:
            return self._plain(node, state)
        bias = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
        axes = {F.linear: -1, F.conv1d: -2, F.conv2d: -3, torch.conv2d: -3, F.conv3d: -4}
        return Scaled(1, axes[node.target], bias is not None)

    def _mean(self, node: fx.Node, state: Scaled) -> State:
        """Means over the pixels of an image keep its channels apart; others take one factor."""
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) == 2 else None)
        pixels = isinstance(dims, (tuple, list)) and set(dims) in ({2, 3}, {-1, -2})
        if not pixels or state.axis != -3:
            return self._plain(node, state)
        return Scaled(state.groups, -3 if node.kwargs.get("keepdim", False) else -1, state.shift)

    def _sum(self, node: fx.Node) -> State:
        operands = node.args[:2]
        tensors = [operand for operand in operands if isinstance(operand, fx.Node)]
        states = [self.states[operand] for operand in tensors]
        if len(operands) < 2 or any(isinstance(self.states[other], Unknown) for other in node.all_input_nodes):
            return self._no_rule(node)
        if len(tensors) == 1:  # and a number
            (state,) = states
            number = next(operand for operand in operands if not isinstance(operand, fx.Node))
            if not isinstance(number, (int, float)):
                return self._no_rule(node)
            return self._no_rule(node) if state.axis is None else Scaled(state.groups, state.axis, shift=True)
        if SAME in states:
            self.mismatches += [operand for operand, state in zip(tensors, states, strict=True) if state is SAME]
            return Unknown(f"the addition {node.name} has a branch that is not scaled along")
        one, two = states
        if one.plain and two.plain:
            return one if one == two else Scaled(1)
        axes = {state.axis for state in states if not state.plain}
        if one.groups != two.groups or len(axes) != 1 or None in axes:
            return Unknown(f"the addition {node.name} has branches that are scaled differently")
        return Scaled(one.groups, axes.pop(), one.shift or two.shift)

    def _product(self, node: fx.Node, quotient: bool, elementwise: bool) -> State:
        operands = node.args[:2]
        states = [self.states[operand] if isinstance(operand, fx.Node) else SAME for operand in operands]
        scaled = [state for state in states if state is not SAME]
        if len(operands) < 2 or len(scaled) != 1 or (quotient and states[0] is SAME):
            return self._no_rule(node)
        (state,) = scaled
        if elementwise and not all(isinstance(operand, fx.Node) for operand in operands):
            return state  # a number
        if elementwise:
            return self._without_shift(node, state)
        return self._plain(node, state)

    def _concatenation(self, node: fx.Node) -> State:
        parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        states = [self.states[part] for part in parts]
        scaled = [state for state in states if state is not SAME]
        if len(scaled) == len(states) and all(state.plain for state in scaled):
            return Scaled(1)
        axes = {state.axis for state in scaled}
        if len(axes) != 1 or None in axes or dim not in (1, *axes):
            return Unknown(f"{node.name} joins values that are scaled differently")
        return Scaled(0, axes.pop(), any(state.shift for state in scaled))
