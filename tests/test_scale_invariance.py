import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from lib.ensemble import Ensemble
from lib.networks import Linear, conv_net, mlp, vgg
from lib.normalization import BatchNorm, DiminishingBatchNorm, NormalizedLayer
from lib.scale_invariance import Groups, scale_invariant_groups

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_start(module, seed=0):
    """float64 and no special values: shifts are not zero, scales not one."""
    generator = seeded(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module


def sequence(*layers):
    return random_start(nn.Sequential(*layers))


def batch(*shape, seed=1):
    return torch.randn(*shape, generator=seeded(seed), dtype=F64)


def check(groups, module, inputs, most=1e-9):
    """Every parameter in one place, and what the structure says is what is measured."""
    names = [*groups.rows, *(n for names in groups.matrices for n in names), *groups.rest]
    names += [n for names, _ in groups.slices for n in names]
    assert sorted(names) == sorted(name for name, _ in module.named_parameters())
    table = groups.verify(module, inputs)
    assert (table["change"] < most).all(), table
    return groups


def changes_when_scaled(module, inputs, names, row=None):
    """From the definition, for one block: scale it by 3 and compare."""
    changed = copy.deepcopy(module)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        before = changed(inputs)
        for name in names:
            part = parameters[name] if row is None else parameters[name][row]
            part.mul_(3.0)
        return float((changed(inputs) - before).abs().max() / before.abs().max())


# The networks of the paper


@pytest.mark.parametrize("bias", [True, False])
def test_the_blocks_of_a_fully_normalized_relu_network_are_those_of_the_paper(bias):
    net = random_start(mlp((6, 5, 4, 3), seeded(), batch_norm=True, eps=0.0, bias=bias))
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    assert groups.rows == ("0.weight", "3.weight", "6.weight")
    assert groups.matrices == (("1.weight", "1.bias"), ("4.weight", "4.bias"))
    assert groups.rest == (("0.bias", "3.bias", "6.bias") if bias else ()) + ("7.weight", "7.bias")
    assert ("0.bias: has no effect and no gradient, a normalization takes it away" in groups.notes) == bias
    assert "7.weight and 7.bias: it scales the output" in groups.notes


def test_the_paper_s_network_has_nothing_but_the_last_scales_and_shifts_outside_the_blocks():
    net = random_start(vgg((3, 32, 32), seeded(), width=2, fc=5))
    groups = check(scale_invariant_groups(net), net, batch(12, 3, 32, 32))
    weights = [name for name, parameter in net.named_parameters() if parameter.ndim > 1]
    assert groups.rows == tuple(weights)
    assert len(weights) == 16
    assert len(groups.matrices) == 15
    assert groups.rest == ("52.weight", "52.bias")


def test_a_convolutional_network_passes_pools_and_the_flattening():
    net = random_start(conv_net((1, 8, 8), (6,), seeded(), channels=(2, 3), batch_norm=True, eps=0.0, bias=False))
    groups = check(scale_invariant_groups(net), net, batch(9, 1, 8, 8))
    assert len(groups.rows) == 4
    assert len(groups.matrices) == 3


def test_without_normalization_nothing_is_invariant_but_the_reasons_are_given():
    groups = scale_invariant_groups(mlp((6, 5, 3), seeded()))
    assert not groups.rows + groups.matrices + groups.slices
    assert groups.rest == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert groups.notes == ("0.weight: it scales the output", "2.weight: it scales the output")


def test_a_smooth_activation_leaves_scales_and_shifts_outside():
    net = random_start(mlp((6, 5, 3), seeded(), batch_norm=True, eps=0.0, activation=nn.Tanh))
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    assert groups.rows == ("0.weight", "3.weight")
    assert groups.matrices == ()
    assert "1.weight and 1.bias: 2 (Tanh) is not known to be positively homogeneous" in groups.notes
    assert changes_when_scaled(net, batch(9, 6), ("1.weight", "1.bias")) > 1e-3


def test_a_constant_eps_breaks_invariance_and_the_smoothing_of_equation_8_only_that_of_the_layer_before():
    plain = random_start(mlp((6, 5, 3), seeded(), batch_norm=True, eps=1e-3, bias=False))
    groups = scale_invariant_groups(plain)
    assert not groups.rows + groups.matrices
    assert "0.weight: 1 has eps = 0.001" in groups.notes
    trusted = scale_invariant_groups(plain, trust_eps=True)
    assert (trusted.rows, len(trusted.matrices)) == (("0.weight", "3.weight"), 1)
    assert "invariant up to a small eps that was trusted: 1 (eps = 0.001), 4 (eps = 0.001)" in trusted.notes
    assert (trusted.verify(plain, batch(9, 6))["change"] > 1e-9).all()

    for eps in (0.0, 0.1):
        smooth = sequence(NormalizedLayer(nn.Linear(6, 5), eps), nn.ReLU(), NormalizedLayer(nn.Linear(5, 3), eps))
        groups = check(scale_invariant_groups(smooth), smooth, batch(9, 6))
        assert groups.rows == ("0.layer.weight", "2.layer.weight")
        assert groups.matrices == (() if eps else (("0.weight", "0.bias"),))
        assert (changes_when_scaled(smooth, batch(9, 6), ("0.weight", "0.bias")) > 1e-6) == (eps > 0)


def test_an_eps_that_is_not_small_is_never_trusted():
    groups = scale_invariant_groups(mlp((6, 5, 3), seeded(), batch_norm=True, eps=0.1), trust_eps=True)
    assert not groups.rows


# Other normalizations


@pytest.mark.parametrize("bias", [True, False])
def test_a_group_norm_makes_blocks_of_its_groups_with_their_biases(bias):
    net = sequence(nn.Conv2d(3, 6, 3, bias=bias), nn.GroupNorm(2, 6, eps=0.0), nn.ReLU())
    groups = check(scale_invariant_groups(net), net, batch(4, 3, 6, 6))
    assert groups.slices == ((("0.weight", "0.bias") if bias else ("0.weight",), 2),)
    assert changes_when_scaled(net, batch(4, 3, 6, 6), ("0.weight",), row=0) > 1e-3
    if bias:
        assert changes_when_scaled(net, batch(4, 3, 6, 6), ("0.weight",)) > 1e-3


def test_layer_norm_makes_one_block_and_instance_norm_rows():
    net = sequence(nn.Linear(6, 5), nn.LayerNorm(5, eps=0.0), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4, eps=0.0))
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    assert groups.matrices == (("0.weight", "0.bias"), ("3.weight", "3.bias"))
    assert "1.weight and 1.bias: 4 keeps a bias that is not scaled along" in groups.notes
    net = sequence(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, eps=0.0, affine=True))
    assert check(scale_invariant_groups(net), net, batch(2, 3, 6, 6)).rows == ("0.weight",)
    net = sequence(nn.Conv2d(3, 4, 3), nn.GroupNorm(4, 4, eps=0.0))
    assert check(scale_invariant_groups(net), net, batch(2, 3, 6, 6)).rows == ("0.weight",)
    net = sequence(nn.Linear(6, 5, bias=False), nn.RMSNorm(5, eps=0.0))
    assert check(scale_invariant_groups(net), net, batch(9, 6)).matrices == (("0.weight",),)


@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_directions_of_weight_normalization_are_invariant_and_its_lengths_in_front_of_a_batch_norm(style):
    normalize = parametrizations.weight_norm if style == "new" else nn.utils.weight_norm
    net = sequence(normalize(nn.Linear(6, 5)), nn.ReLU(), normalize(nn.Linear(5, 4)), BatchNorm(4, 0.0))
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    length, direction = (
        ("parametrizations.weight.original0", "parametrizations.weight.original1")
        if style == "new"
        else ("weight_g", "weight_v")
    )
    assert groups.rows == (f"0.{direction}", f"2.{direction}", f"2.{length}")
    assert groups.matrices == ((f"0.{length}", "0.bias"),)
    whole = sequence(parametrizations.weight_norm(nn.Linear(6, 5), dim=None), nn.Tanh())
    groups = check(scale_invariant_groups(whole), whole, batch(9, 6))
    assert groups.matrices == (("0.parametrizations.weight.original1",),)


def test_torch_s_batch_norm_counts_in_training_and_not_by_its_running_averages():
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()).double()
    assert scale_invariant_groups(net).rows == ()
    assert check(scale_invariant_groups(net, trust_eps=True), net, batch(9, 6), most=1e-3).rows == ("0.weight",)
    groups = scale_invariant_groups(net.eval(), trust_eps=True)
    assert groups.rows == ()
    assert "0.weight: 1 normalizes by running averages (evaluation)" in groups.notes
    assert changes_when_scaled(net, batch(9, 6), ("0.weight",)) > 0.1


def test_statistics_of_former_batches_do_not_count():
    net = sequence(nn.Linear(6, 5), DiminishingBatchNorm(5, alpha=0.5, eps=0.0))
    assert scale_invariant_groups(net).rows == ()


# Other structures


class Residual(nn.Module):
    """A stream that two branches are added to; where it starts and ends says what is invariant."""

    def __init__(self, start="norm", end="norm"):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = BatchNorm(5, 0.0) if start == "norm" else nn.Identity()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), BatchNorm(5, 0.0), nn.ReLU(), nn.Linear(5, 5), BatchNorm(5, 0.0))
            for _ in range(2)
        )
        self.last = nn.Linear(5, 3)
        self.end = BatchNorm(3, 0.0) if end == "norm" else nn.Identity()

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        for branch in self.branches:
            x = torch.relu(branch(x) + x)
        return self.end(self.last(x))


def test_scales_and_shifts_that_meet_in_additions_are_one_block_together():
    net = random_start(Residual())
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    stream = ("norm.weight", "norm.bias", "branches.0.4.weight", "branches.0.4.bias")
    stream += ("branches.1.4.weight", "branches.1.4.bias")
    assert stream in [tuple(sorted(names, key=stream.index)) for names in groups.matrices if len(names) > 2]
    assert ("branches.0.1.weight", "branches.0.1.bias") in groups.matrices
    assert set(groups.rest) == {"end.weight", "end.bias"} | {n for n, _ in net.named_parameters() if "bias" in n} - {
        name for names in groups.matrices for name in names
    }
    assert any("invariant only jointly, they meet in additions" in note for note in groups.notes)
    assert changes_when_scaled(net, batch(9, 6), ("norm.weight", "norm.bias")) > 1e-3


def test_a_stream_that_starts_without_normalization_takes_its_layer_along():
    net = random_start(Residual(start="plain"))
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    (stream,) = (names for names in groups.matrices if len(names) > 2)
    assert {"first.weight", "first.bias", "branches.0.4.weight"} <= set(stream)


def test_a_stream_that_ends_without_normalization_is_outside():
    groups = scale_invariant_groups(random_start(Residual(end="plain")))
    assert all(len(names) == 2 for names in groups.matrices)
    assert {"norm.weight", "branches.1.4.bias"} <= set(groups.rest)


def test_an_addition_of_the_input_cannot_be_scaled_along():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.end = nn.Linear(5, 5), BatchNorm(5, 0.0), BatchNorm(5, 0.0)

        def forward(self, x):
            return self.end(x + self.norm(self.layer(x)))

    net = random_start(Skip())
    groups = check(scale_invariant_groups(net), net, batch(9, 5))
    assert groups.rows == ("layer.weight",)
    assert groups.matrices == ()
    assert "norm.weight and norm.bias: the addition add has a branch that is not scaled along" in groups.notes


class Functional(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), BatchNorm(4, 0.0)
        self.linear, self.end = nn.Linear(4 * 4, 3, bias=False), BatchNorm(3, 0.0)
        self.between = between

    def forward(self, x):
        x = self.between(self.norm(self.conv(x)))
        return self.end(self.linear(x.flatten(1)))


HOMOGENEOUS = {
    "functional": lambda x: F.max_pool2d(F.relu(x), 2),
    "torch": lambda x: torch.relu(F.avg_pool2d(x, 2)),
    "methods": lambda x: F.adaptive_avg_pool2d(x.relu(), 2),
    "leaky": lambda x: F.max_pool2d(F.leaky_relu(x, 0.1), 2),
    "in place": lambda x: F.max_pool2d(x.relu_(), 2),
    "factor": lambda x: F.max_pool2d(0.5 * x / 3, 2),
    "doubled": lambda x: F.max_pool2d(x + F.relu(x), 2),
    "sum": lambda x: F.max_pool2d(torch.add(x, x.relu()), 2),
    "cut": lambda x: F.max_pool2d(x.clamp(min=0), 2),
    "dropout": lambda x: F.max_pool2d(F.dropout(x, 0.5), 2),
    "padded": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3),
    "reshaped": lambda x: F.max_pool2d(x, 2).view(x.size(0), -1, 1),
    "joined": lambda x: torch.cat([F.max_pool2d(x, 4), F.avg_pool2d(x, 4), x[:, :, :1, :1], -x[:, :, 1:2, :1]], 1),
}
NOT_HOMOGENEOUS = {
    "tanh": lambda x: F.max_pool2d(torch.tanh(x), 2),
    "plus one": lambda x: F.relu(F.max_pool2d(x, 2) + 1),
    "softmax": lambda x: F.max_pool2d(x, 2).softmax(1),
    "clipped": lambda x: F.max_pool2d(x.clamp(0, 1), 2),
    "padded with ones": lambda x: F.relu(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), value=1.0), 3)),
    "in place": lambda x: F.max_pool2d(x.sigmoid_() + x, 2),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_functions_that_are_homogeneous_are_known(name):
    net = random_start(Functional(HOMOGENEOUS[name]))
    groups = check(scale_invariant_groups(net), net, batch(9, 2, 6, 6))
    assert groups.matrices == (("norm.weight", "norm.bias"),)
    assert groups.rows == ("conv.weight", "linear.weight")


@pytest.mark.parametrize("name", NOT_HOMOGENEOUS)
def test_others_are_taken_not_to_be(name):
    net = random_start(Functional(NOT_HOMOGENEOUS[name]))
    groups = check(scale_invariant_groups(net), net, batch(9, 2, 6, 6))
    assert groups.matrices == ()
    assert changes_when_scaled(net, batch(9, 2, 6, 6), ("norm.weight", "norm.bias")) > 1e-6
    assert any(note.startswith("norm.weight and norm.bias: ") for note in groups.notes)


@pytest.mark.parametrize("between", [lambda x: F.max_pool2d(x * x, 2), lambda x: 1 / F.max_pool2d(x, 2)])
def test_homogeneity_of_another_degree_is_missed(between):
    """Known to be too careful: these blocks are invariant."""
    net = random_start(Functional(between))
    assert scale_invariant_groups(net).matrices == ()
    assert changes_when_scaled(net, batch(9, 2, 6, 6), ("norm.weight", "norm.bias")) < 1e-9


def test_a_deep_linear_part_is_invariant_layer_by_layer():
    net = sequence(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.Linear(5, 4), BatchNorm(4, 0.0))
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    assert groups.matrices == (("0.weight", "0.bias"), ("2.weight",))
    assert groups.rows == ("3.weight",)


def test_zero_padding_after_a_bias_is_noticed():
    net = sequence(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 3, padding=1, bias=False), BatchNorm(3, 0.0))
    groups = check(scale_invariant_groups(net), net, batch(4, 2, 5, 5))
    assert groups.matrices == (("0.weight", "0.bias"),)
    assert changes_when_scaled(net, batch(4, 2, 5, 5), ("0.weight",)) > 1e-3


def test_operations_along_the_channels_mix_rows():
    """A pool over the features of a fully connected layer; rows alone are not invariant, the layer is."""
    net = sequence(nn.Linear(6, 8), nn.MaxPool1d(2), BatchNorm(4, 0.0))
    groups = check(scale_invariant_groups(net), net, batch(9, 6))
    assert (groups.rows, groups.matrices) == ((), (("0.weight", "0.bias"),))
    assert changes_when_scaled(net, batch(9, 6), ("0.weight",), row=0) > 1e-3
    net = sequence(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), nn.Flatten(), BatchNorm(16, 0.0))
    assert check(scale_invariant_groups(net), net, batch(9, 2, 6, 6)).rows == ("0.weight",)


def test_shared_layers_need_a_normalization_at_every_use():
    class Shared(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.layer, self.norm = nn.Linear(5, 5), BatchNorm(5, 0.0)
            self.twice = twice

        def forward(self, x):
            x = self.norm(self.layer(x))
            return self.norm(self.layer(x)) if self.twice == "normalized" else self.layer(x)

    net = random_start(Shared("normalized"))
    assert check(scale_invariant_groups(net), net, batch(9, 5)).rows == ("layer.weight",)
    net = random_start(Shared("plain"))
    assert check(scale_invariant_groups(net), net, batch(9, 5)).rows == ()


def test_a_tied_weight_that_is_also_used_elsewhere_is_outside():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(5, 5), BatchNorm(5, 0.0)

        def forward(self, x):
            return F.linear(self.norm(self.layer(x)), self.layer.weight)

    net = random_start(Tied())
    groups = check(scale_invariant_groups(net), net, batch(9, 5))
    assert groups.rows == ()
    assert "layer.weight: layer.weight is used outside a layer" in groups.notes


def test_a_value_that_is_changed_in_place_is_followed():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.end = nn.Linear(5, 5), BatchNorm(5, 0.0), BatchNorm(5, 0.0)

        def forward(self, x):
            y = self.norm(self.layer(x))
            view = y.view(-1)
            y += x  # y is no longer homogeneous, and neither is its view
            return self.end(view.view(-1, 5))

    net = random_start(InPlace())
    assert changes_when_scaled(net, batch(9, 5), ("norm.weight", "norm.bias")) > 1e-3
    assert check(scale_invariant_groups(net), net, batch(9, 5)).matrices == ()


def test_a_subclass_with_a_forward_of_its_own_is_looked_into():
    class Odd(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.tanh(), self.bias)

    net = sequence(Odd(6, 5), BatchNorm(5, 0.0))
    assert check(scale_invariant_groups(net), net, batch(9, 6)).rows == ()


def test_a_residual_network_with_steps_in_place_as_others_write_it():
    """ReLU in place, ``out += identity``, a projection where the width changes, global averages at the end."""

    class Block(nn.Module):
        def __init__(self, width_in, width_out):
            super().__init__()
            self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width_out)
            self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width_out)
            self.relu = nn.ReLU(inplace=True)
            change = nn.Sequential(nn.Conv2d(width_in, width_out, 1, bias=False), nn.BatchNorm2d(width_out))
            self.downsample = change if width_in != width_out else None

        def forward(self, x):
            identity = x
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return self.relu(out)

    stem = [nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    net = sequence(*stem, Block(4, 4), Block(4, 6), Block(6, 6), *tail)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-12  # torch takes no 0 in training
    groups = check(scale_invariant_groups(net, trust_eps=True), net, batch(9, 1, 8, 8), most=1e-6)
    assert set(groups.rows) == {n for n, p in net.named_parameters() if p.ndim == 4}
    # The first stream: the stem and block 4, up to the convolutions of block 5. The last one ends in the classifier.
    assert ("1.weight", "1.bias", "4.bn2.weight", "4.bn2.bias") in groups.matrices
    assert {"5.bn2.weight", "5.downsample.1.weight", "6.bn2.weight", "9.weight", "9.bias"} <= set(groups.rest)


def test_one_layer_and_unused_parameters():
    layer = random_start(nn.Linear(3, 2))
    assert check(scale_invariant_groups(layer), layer, batch(4, 3)).rest == ("weight", "bias")
    smooth = random_start(NormalizedLayer(Linear(3, 2), 0.5))
    assert check(scale_invariant_groups(smooth), smooth, batch(4, 3)).rows == ("layer.weight",)

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x)

    assert "other.weight" in scale_invariant_groups(Unused()).rest


def test_what_cannot_be_traced_is_named_with_the_reason():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"module must have a forward that torch.fx can trace, Branching has not: .*"):
        scale_invariant_groups(Branching())
    with pytest.raises(ValueError, match="module must have values"):
        scale_invariant_groups(mlp((3, 2), seeded(), batch_norm=True).to("meta"))


# A random network: no block is made up, and the fully normalized parts are all found

PARTS = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "tanh": nn.Tanh,
    "bn": lambda: BatchNorm(6, 0.0),
    "bn eps": lambda: BatchNorm(6, 0.3),
    "ln": lambda: nn.LayerNorm(6, eps=0.0),
    "gn": lambda: nn.GroupNorm(2, 6, eps=0.0),
    "linear": lambda: nn.Linear(6, 6),
    "no bias": lambda: nn.Linear(6, 6, bias=False),
    "smooth": lambda: NormalizedLayer(nn.Linear(6, 6), 0.3),
    "exact": lambda: NormalizedLayer(nn.Linear(6, 6, bias=False), 0.0),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "prelu": nn.PReLU,
}


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=7), st.integers(0, 10**6))
def test_no_block_of_a_random_network_is_made_up_and_none_that_matters_is_missed(parts, seed):
    net = random_start(nn.Sequential(*(PARTS[part]() for part in parts)), seed)
    inputs = batch(11, 6, seed=seed + 1)
    outputs = net(inputs)
    # A constant feature in front of a norm (a dead ReLU) makes rounding errors large, or NaN.
    assume(bool((net(inputs * (1 + 1e-12)) - outputs).abs().max() < 1e-8))
    groups = check(scale_invariant_groups(net), net, inputs, most=1e-6)
    for name in groups.rest:
        parameter = dict(net.named_parameters())[name]
        if parameter.ndim == 2:
            # A weight outside although every row alone, or the whole, could be scaled, is a block that was missed.
            rows = [changes_when_scaled(net, inputs, (name,), row) for row in range(len(parameter))]
            whole = changes_when_scaled(net, inputs, (name,))
            assert max(rows) > 1e-9, (parts, name, groups.notes)
            assert whole > 1e-9, (parts, name, groups.notes)


class Program(nn.Module):
    """Values made one from another: by a part, or as a sum of two."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleList(PARTS[part]() for part, _, _ in steps if part in PARTS)

    def forward(self, x):
        values, parts = [x], iter(self.parts)
        for part, i, j in self.steps:
            one, other = values[-1 - i % len(values)], values[j % len(values)]
            if part in PARTS:
                values.append(next(parts)(one))
            elif part == "in place":
                one += other
                values.append(one)
            else:
                values.append(one + other)
        return values[-1]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sum", "in place", "bn", "bn", *sorted(PARTS)]), st.integers(0, 2), st.integers(0, 9)
        ),
        min_size=2,
        max_size=10,
    ),
    st.integers(0, 10**6),
)
def test_no_block_of_a_network_with_branches_is_made_up(steps, seed):
    net = random_start(Program([*steps, ("linear", 0, 0), ("bn", 0, 0)]), seed)
    inputs = batch(11, 6, seed=seed + 1)
    with torch.no_grad():
        outputs = net(inputs.clone())
        assume(bool((net(inputs * (1 + 1e-12)) - outputs).abs().max() < 1e-8))

    class Copying(nn.Module):  # steps in place must not change the batch that is used again
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.clone())

    check(scale_invariant_groups(Copying()), Copying(), inputs, most=1e-6)


# Measuring


def test_verify_finds_wrong_answers():
    net = sequence(nn.Linear(6, 5, bias=False), nn.LayerNorm(5, eps=0.0), nn.ReLU(), nn.Linear(5, 4), nn.Tanh())
    x = batch(9, 6)
    right = scale_invariant_groups(net)
    assert right.matrices == (("0.weight",),)
    assert right.verify(net, x)["change"].tolist() == [0.0]
    rest = tuple(name for name, _ in net.named_parameters() if name not in ("0.weight", "3.weight", "3.bias"))
    wrong = Groups(("0.weight",), (("3.weight", "3.bias"),), (), rest, ())
    table = wrong.verify(net, x)
    assert table["block"].tolist() == ["0.weight", "3.weight + 3.bias"]
    assert table["kind"].tolist() == ["rows", "joint"]
    assert table["count"].tolist() == [5, 1]
    assert (table["change"] > 1e-3).all()
    slices = dataclasses.replace(
        wrong, rows=(), slices=((("0.weight",), 5),), matrices=(), rest=(*rest, "3.weight", "3.bias")
    )
    assert slices.verify(net, x)["change"].tolist()[0] > 1e-3


def test_verify_touches_nothing_and_a_power_of_two_changes_no_bit():
    net = nn.Sequential(
        *(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU()),
        *(nn.Linear(4, 3, bias=False), BatchNorm(3, 0.0)),
    )
    random_start(net)
    state = copy.deepcopy(net.state_dict())
    groups, random_state = scale_invariant_groups(net), torch.get_rng_state()
    table = groups.verify(net, batch(9, 6))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert table.set_index("block")["change"].to_dict() == {"4.weight": 0.0, "1.weight + 1.bias": 0.0}
    assert 0 < groups.verify(net, batch(9, 6), factor=3.0)["change"].max() < 1e-12
    for bad in (1.0, 0, -2.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor must be positive, finite and not one, got"):
            groups.verify(net, batch(9, 6), factor=bad)


def make(seed, eps=0.0):
    return random_start(
        nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, eps=eps), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False)),
            *(BatchNorm(3, eps), nn.ReLU(), nn.Flatten(), Linear(12, 2, bias=False), BatchNorm(2, eps)),
        ),
        seed,
    )


def test_norms_and_the_intrinsic_gradient_are_those_of_every_block_on_its_own():
    """Oracle: block by block, the gradient found at the normalized parameters (Lemma 2.2)."""
    x, y = batch(7, 1, 6, 6), batch(7, 2, seed=2)
    nets = [make(seed) for seed in range(3)]
    groups = scale_invariant_groups(nets[0])
    assert (len(groups.rows), len(groups.matrices), len(groups.slices)) == (2, 2, 1)
    ensemble = Ensemble(nets)
    ensemble.losses(F.mse_loss, x, y).sum().backward()
    together, norms = groups.intrinsic_gradient(ensemble), groups.block_norms(ensemble)
    assert together.total.shape == (3,)
    for s, net in enumerate(nets):
        F.mse_loss(net(x), y).backward()
        alone = groups.intrinsic_gradient(net)
        parameters = dict(net.named_parameters())
        for name in groups.rows:
            rows = parameters[name].detach().flatten(1)
            torch.testing.assert_close(norms[name][s], rows.norm(dim=1), rtol=1e-13, atol=0)
        unit = copy.deepcopy(net)
        blocks = []
        with torch.no_grad():
            views = dict(unit.named_parameters())
            for name in groups.rows:
                blocks += [[(name, k)] for k in range(len(views[name]))]
            blocks += [[(name, slice(None)) for name in names] for names in groups.matrices]
            for names, count in groups.slices:
                for j in range(count):
                    size = len(views[names[0]]) // count
                    blocks.append([(name, slice(j * size, (j + 1) * size)) for name in names])
            for block in blocks:
                norm = sum(views[name][part].square().sum() for name, part in block).sqrt()
                for name, part in block:
                    views[name][part] = views[name][part] / norm
        unit.zero_grad()
        F.mse_loss(unit(x), y).backward()
        views = dict(unit.named_parameters())
        invariant = sum(views[name].grad[part].square().sum() for block in blocks for name, part in block)
        rest = sum(views[name].grad.square().sum() for name in groups.rest)
        for value in (alone, type(together)(*(part[s] for part in together))):
            torch.testing.assert_close(value.invariant, invariant, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(value.rest, rest, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(value.total, invariant + rest, rtol=1e-9, atol=1e-12)
        # Lemma 2.4: the gradient of a block has no part along it.
        for block in blocks:
            inner = sum((parameters[name][part] * parameters[name].grad[part]).sum() for name, part in block)
            assert abs(inner) < 1e-11


def test_gradients_may_be_given_and_must_be_there():
    net = make(0)
    groups = scale_invariant_groups(net)
    with pytest.raises(ValueError, match="module must have gradients"):
        groups.intrinsic_gradient(net)
    loss = F.mse_loss(net(batch(7, 1, 6, 6)), batch(7, 2, seed=2))
    names, parameters = zip(*net.named_parameters(), strict=True)
    given = dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))
    loss.backward()
    assert groups.intrinsic_gradient(net, given) == groups.intrinsic_gradient(net)


def test_an_ensemble_has_the_groups_of_one_copy():
    nets = [make(seed) for seed in range(2)]
    ensemble = Ensemble(nets)
    assert scale_invariant_groups(ensemble) == scale_invariant_groups(nets[0])
    table = scale_invariant_groups(ensemble).verify(ensemble, batch(7, 1, 6, 6))
    assert (table["change"] == 0).all()
    smoothed = [mlp((3, 2), seeded(), batch_norm=True, eps=eps, bias=False) for eps in (0.0, 1e-3)]
    assert scale_invariant_groups(smoothed[0]).rows == ("0.weight",)
    assert scale_invariant_groups(Ensemble(smoothed)).rows == ()  # one run's eps breaks the invariance of all


def test_parameter_groups_hold_every_parameter_once_at_its_rate():
    ensemble = Ensemble([make(seed) for seed in range(2)])
    groups = scale_invariant_groups(ensemble)
    rates = torch.tensor([0.1, 10.0], dtype=F64)
    made = groups.parameter_groups(ensemble, rates, 0.5)
    held = [id(parameter) for group in made for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in ensemble.parameters())
    assert [group["blocks"] for group in made] == ["rows", "joint", "joint", 2, None]
    assert all(group["lr"] is (0.5 if group["blocks"] is None else rates) for group in made)
    assert all(group["stacked"] for group in made)
    alone = groups.parameter_groups(ensemble.module(0), 0.1)
    assert all(group["lr"] == 0.1 and not group["stacked"] for group in alone)


def test_groups_of_another_module_are_refused():
    groups = scale_invariant_groups(make(0))
    with pytest.raises(
        ValueError, match="module must have the parameters the groups were made of, these differ: .*'0.bias'"
    ):
        groups.block_norms(mlp((3, 2), seeded(), bias=False))
