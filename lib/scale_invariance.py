r"""Which parameters of a network are scale-invariant, found from its structure, and what follows from it.

A block w is scale-invariant if :math:`F(cw, \theta') = F(w, \theta')` for all :math:`c > 0` (Definition 2.1). Here no
output of the network changes when it is multiplied by c: ``lib.homogeneity`` follows the factor from node to node.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lib import networks
from lib.ensemble import Ensemble
from lib.homogeneity import CONVOLUTIONS, RULED, SAME, TRANSPOSED, Unknown, Walk, is_plainly, layer_parameters, trace
from lib.normalization import NormalizedLayer
from lib.optimizers.blocks import Unit, cut

# ------------------------------------------------------------------------------------------------------------- groups


class IntrinsicGradient(NamedTuple):
    r"""The squared norm of the gradient of the intrinsic problem (6), ``()`` or ``(S,)``, and its two parts.

    ``total`` is :math:`\|\nabla L(V; g)\|^2`, ``invariant`` the sum of :math:`\|\nabla_{v^{(i)}} L\|^2` over all
    blocks, ``rest`` is :math:`\|\nabla_g L\|^2`.
    """

    total: Tensor
    invariant: Tensor
    rest: Tensor


@dataclass(frozen=True)
class Groups:
    r"""The parameters of a module, by name, as scale-invariant blocks and the rest.

    Every parameter is in one of them. Names are those of the module alone; an ``Ensemble`` of it has the same groups.

    Attributes:
        rows: parameters whose every row or filter (slice of the first axis) is a block.
        matrices: tuples of parameters that are one block jointly: a layer in front of a ``LayerNorm``, weight and bias,
            :math:`(\gamma, \beta)` of a batch norm, or those of all batch norms that meet in additions.
        slices: pairs of a tuple of parameters and a number k: the first axis of each is cut into k pieces, and piece j
            of all of them is one block: a layer in front of a ``GroupNorm`` with k groups.
        rest: parameters that are in no block (g).
        notes: why a parameter is in no block, which eps was trusted, and other remarks.
    """

    rows: tuple[str, ...]
    matrices: tuple[tuple[str, ...], ...]
    slices: tuple[tuple[tuple[str, ...], int], ...]
    rest: tuple[str, ...]
    notes: tuple[str, ...]

    def _blocks(self) -> list[tuple[tuple[str, ...], str | int]]:
        rows = [((name,), "rows") for name in self.rows]
        return rows + [(names, "joint") for names in self.matrices] + list(self.slices)

    def _units(self, module: nn.Module) -> dict[str, Unit]:
        parameters, stacked = self._parameters(module)
        return {
            " + ".join(names): unit
            for names, blocks in self._blocks()
            for unit in cut([parameters[name] for name in names], blocks, stacked)
        }

    def _parameters(self, module: nn.Module) -> tuple[dict[str, nn.Parameter], bool]:
        stacked = isinstance(module, Ensemble)
        parameters = dict((module.copies if stacked else module).named_parameters())
        named = [name for names, _ in self._blocks() for name in names] + list(self.rest)
        if set(named) != set(parameters):
            differing = sorted(set(named) ^ set(parameters))
            raise ValueError(f"module must have the parameters the groups were made of, these differ: {differing}")
        return parameters, stacked

    def block_norms(self, module: nn.Module) -> dict[str, Tensor]:
        """The norm of every block.

        Args:
            module: a module with the parameters of these groups, or an ``Ensemble``.

        Returns:
            By name (of a joint block: names with " + " between), ``(k,)`` norms, ``(S, k)`` for an ensemble.
        """
        units = self._units(module).items()
        return {name: unit.squares([p.detach() for p in unit.parameters]).sqrt() for name, unit in units}

    def intrinsic_gradient(self, module: nn.Module, gradients: Mapping[str, Tensor] | None = None) -> IntrinsicGradient:
        r"""The squared norm of the gradient that does not depend on the scale of the blocks.

        .. math:: \|\nabla L(V; g)\|^2 = \sum_i \|w^{(i)}\|^2 \|\nabla_{w^{(i)}} L\|^2 + \|\nabla_g L\|^2,

        by Lemma 2.2. Nothing is read from the device.

        Args:
            module: a module with the parameters of these groups, or an ``Ensemble``.
            gradients: by parameter name; None takes the ``grad`` of the parameters, zero where there is none.

        Returns:
            The total and its two parts, ``()`` or ``(S,)``.

        Raises:
            ValueError: if no parameter has a gradient.
        """
        parameters, stacked = self._parameters(module)
        if gradients is None:
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if not gradients:
            raise ValueError("module must have gradients: call backward first, or give gradients")
        like = next(iter(gradients.values()))
        invariant = rest = like.new_zeros(like.shape[:1] if stacked else ())
        with torch.no_grad():
            for names, blocks in self._blocks():
                weights = [parameters[name] for name in names]
                slopes = [gradients.get(name, torch.zeros_like(parameters[name])) for name in names]
                (unit,) = cut(weights, blocks, stacked)
                invariant = invariant + (unit.squares(weights) * unit.squares(slopes)).sum(-1)
            for name in self.rest:
                if name in gradients:
                    rest = rest + Unit((parameters[name],), 1, stacked).squares([gradients[name]]).squeeze(-1)
        return IntrinsicGradient(invariant + rest, invariant, rest)

    def parameter_groups(
        self, module: nn.Module, lr: Tensor | float, lr_rest: Tensor | float | None = None
    ) -> list[dict]:
        """Parameter groups for an optimizer; those on blocks read ``"blocks"`` and ``"stacked"``, others do not.

        Args:
            module: a module with the parameters of these groups, or an ``Ensemble``.
            lr: step size of the scale-invariant blocks: a number, or ``(S,)``.
            lr_rest: step size of the rest; None for ``lr``.

        Returns:
            The groups, as dictionaries; empty ones are left out.
        """
        parameters, stacked = self._parameters(module)
        common = {"lr": lr, "stacked": stacked}
        groups = [{"params": [parameters[name] for name in self.rows], "blocks": "rows", **common}] if self.rows else []
        for names, blocks in self._blocks():
            if blocks != "rows":
                groups.append({"params": [parameters[name] for name in names], "blocks": blocks, **common})
        if self.rest:
            rest = {"lr": lr if lr_rest is None else lr_rest, "stacked": stacked, "blocks": None}
            groups.append({"params": [parameters[name] for name in self.rest], **rest})
        return groups

    @torch.no_grad()
    def verify(self, module: nn.Module, inputs: Tensor | tuple, factor: float = 2.0) -> pd.DataFrame:
        """Scale every block and measure what the outputs do.

        Blocks of one parameter are scaled together, by the factors c, c^2, c^3, c, ...: rows that are invariant only
        jointly show. Powers of two are exact: without biases in front of normalizations no bit changes. The module is
        left as it was; random operations get the same numbers each time.

        Args:
            module: the module the groups were made of, or an ``Ensemble``; in the same mode (training or evaluation).
            inputs: a batch, or a tuple of the arguments of the module.
            factor: c, positive and not one.

        Returns:
            A table with a row for each parameter or joint block: ``block`` (names), ``kind`` ("rows", "joint" or
            "slices"), ``count`` (number of blocks) and ``change``, the largest change of an output relative to the
            largest output (NaN if an output is not finite).

        Raises:
            ValueError: if ``factor`` is not positive and finite, or is one.
        """
        if not 0 < factor < float("inf") or factor == 1:
            raise ValueError(f"factor must be positive, finite and not one, got {factor}")
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)

        def outputs() -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                result = module(*arguments)
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            return torch.cat([leaf.flatten() for leaf in leaves])

        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        before = outputs()
        table = []
        for (names, blocks), unit in zip(self._blocks(), self._units(module).values(), strict=True):
            kept = [parameter.clone() for parameter in unit.parameters]
            powers = torch.arange(unit.count, device=before.device) % 3 + 1
            unit.scale((torch.full_like(powers, 1, dtype=kept[0].dtype) * factor) ** powers + 0 * unit.squares(kept))
            try:
                change = (outputs() - before).abs().max() / before.abs().max()
            finally:
                for parameter, old in zip(unit.parameters, kept, strict=True):
                    parameter.copy_(old)
            kind = blocks if isinstance(blocks, str) else "slices"
            table.append((" + ".join(names), kind, unit.count, float(change)))
        for name, buffer in module.named_buffers():  # running averages
            buffer.copy_(buffers[name])
        return pd.DataFrame(table, columns=["block", "kind", "count", "change"])


# ------------------------------------------------------------------------------------------------------------- search


class _Search:
    """Candidates for every parameter, from the finest blocks to the coarsest."""

    def __init__(self, module: nn.Module, trust_eps: bool):
        self.trust_eps = trust_eps
        self.run_axes = int(isinstance(module, Ensemble))
        module = module.copies if isinstance(module, Ensemble) else module
        self.graph, self.modules = trace(module)
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.rows: list[str] = []
        self.matrices: list[tuple[str, ...]] = []
        self.slices: list[tuple[tuple[str, ...], int]] = []
        self.notes: list[str] = []
        self.trusted: set[str] = set()
        self.assigned: set[int] = set()
        self.pieces = sorted(
            {norm.num_groups for norm in self.modules.values() if isinstance(norm, nn.GroupNorm)} - {1}, reverse=True
        )

    def _walk(self, candidate: Iterable[nn.Parameter], groups: int) -> Walk:
        return Walk(self.graph, self.modules, candidate, groups, self.trust_eps)

    def _accept(self, walk: Walk, candidate: tuple[nn.Parameter, ...], blocks: str | int) -> None:
        names = tuple(self.names[id(parameter)] for parameter in candidate)
        self.assigned |= {id(parameter) for parameter in candidate}
        self.trusted |= walk.trusted
        if blocks == "rows":
            self.rows += names
        elif blocks == "joint":
            self.matrices.append(names)
        else:
            self.slices.append((names, blocks))

    def _try(self, trials: list[tuple[tuple[nn.Parameter, ...], int, str | int]]) -> None:
        """Accept the first candidate that leaves the outputs unchanged, else note why the coarsest does not."""
        reasons: dict[str | int, str] = {}
        for candidate, groups, blocks in trials:
            if any(id(parameter) in self.assigned for parameter in candidate):
                continue
            walk = self._walk(candidate, groups)
            while walk.output is not SAME and blocks == "joint":
                more = self._along(walk, candidate)
                if more is None:
                    break
                candidate = more
                walk = self._walk(candidate, groups)
            if walk.output is SAME and walk.seen:
                self._accept(walk, candidate, blocks)
                if len(candidate) > 2:
                    names = ", ".join(self.names[id(parameter)] for parameter in candidate)
                    self.notes.append(f"{names}: invariant only jointly, they meet in additions")
                return
            if blocks not in reasons:
                scales = "it is not used" if walk.output is SAME else "it scales the output"
                reasons[blocks] = walk.output.reason if isinstance(walk.output, Unknown) else scales
        if reasons:
            names = " and ".join(self.names[id(parameter)] for parameter in trials[0][0])
            self.notes.append(f"{names}: {list(reasons.values())[-1]}")

    def _along(self, walk: Walk, candidate: tuple[nn.Parameter, ...]) -> tuple[nn.Parameter, ...] | None:
        """The candidate with what must be scaled along for the additions to be homogeneous; None if that cannot be."""
        found = list(candidate)
        known = {id(parameter) for parameter in candidate}
        pending = list(walk.mismatches)
        while pending:
            node = pending.pop()
            module = self.modules[node.target] if node.op == "call_module" else None
            producers = self._producers(module)
            if producers is None:
                if node.op == "placeholder" or node.op == "get_attr" or not node.all_input_nodes:
                    return None
                pending += node.all_input_nodes
                continue
            if any(id(parameter) in self.assigned for parameter in producers):
                return None
            found += [parameter for parameter in producers if id(parameter) not in known]
            known |= {id(parameter) for parameter in producers}
        return tuple(found) if len(found) > len(candidate) else None

    @staticmethod
    def _producers(module: nn.Module | None) -> list[nn.Parameter] | None:
        """The parameters in which the outputs of a module are of degree one jointly."""
        if module is None:
            return None
        if is_plainly(module, (nn.Linear, networks.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            layer = layer_parameters(module)
            if layer.scale is None or (module.bias is not None and layer.bias is None):
                return None
            return [layer.scale] if layer.bias is None else [layer.scale, layer.bias]
        if is_plainly(module, RULED):
            return list(module.parameters(recurse=False)) or None
        return None

    def run(self) -> Groups:
        called = [self.modules[node.target] for node in self.graph.nodes if node.op == "call_module"]
        for module in dict.fromkeys(called):
            if is_plainly(module, (nn.Linear, networks.Linear, *CONVOLUTIONS, *TRANSPOSED)):
                self._layer(module)
            elif is_plainly(module, NormalizedLayer):
                self._layer(module.layer)
                self._try([((module.weight, module.bias), 1, "joint")])
            elif is_plainly(module, RULED):
                parameters = tuple(module.parameters(recurse=False))
                if parameters:
                    self._try([(parameters, 1, "joint")])
        rest = tuple(name for parameter, name in self.names.items() if parameter not in self.assigned)
        if self.trusted:
            self.notes.append(f"invariant up to a small eps that was trusted: {', '.join(sorted(self.trusted))}")
        return Groups(tuple(self.rows), tuple(self.matrices), tuple(self.slices), rest, tuple(self.notes))

    def _layer(self, module: nn.Module) -> None:
        scale, direction, whole, bias = layer_parameters(module)
        if direction is not None:
            self._try([((direction,), 1, "joint") if whole else ((direction,), 0, "rows")])
        if scale is None:
            self.notes.append(f"the weight of {type(module).__name__} is computed in a way that is not known")
            return
        together = [(scale,)] if bias is None else [(scale, bias), (scale,)]
        trials = []
        rows = scale.shape[self.run_axes : self.run_axes + 1]
        if rows and not isinstance(module, TRANSPOSED):
            trials.append(((scale,), 0, "rows"))
            for count in self.pieces:
                if count < rows[0] and rows[0] % count == 0:
                    trials += [(candidate, count, count) for candidate in together]
        trials += [(candidate, 1, "joint") for candidate in together]
        self._try(trials)
        if bias is not None and id(bias) not in self.assigned:
            walk = self._walk([bias], 1)
            name = self.names[id(bias)]
            if walk.output is SAME and walk.seen:
                self.notes.append(f"{name}: has no effect and no gradient, a normalization takes it away")


def scale_invariant_groups(module: nn.Module, *, trust_eps: bool = False) -> Groups:
    r"""Which parameters of a module are scale-invariant, from its structure, in the mode it is in.

    Blocks are: rows and filters in front of a batch norm, layers in front of layer and group norms, directions of
    weight normalization, and :math:`(\gamma, \beta)` of a normalization whose outputs reach the next ones through
    positively homogeneous maps alone. Normalizations count that have eps = 0, and ``NormalizedLayer``, whose own rows
    may have any eps. An operation without a rule is taken not to be homogeneous: a block may be missed, but none is
    made up. One thing the structure does not show is taken for granted: that a ``Linear`` in front of a batch norm
    sees inputs ``(N, features)``. ``Groups.verify`` measures.

    Args:
        module: a module that ``torch.fx`` can trace, or an ``Ensemble``.
        trust_eps: whether to take batch, layer and group norms with an eps up to 0.01 as if it were 0; ``notes`` names
            them.

    Returns:
        The groups, with names as in ``module.named_parameters()`` (of an ``Ensemble``: of one copy).

    Raises:
        ValueError: if the module cannot be traced (its forward depends on values, say), or has an eps without a value.

    Source: Arora, Li and Lyu, Section 2.1.
    """
    return _Search(module, trust_eps).run()
