import copy
import io

import pytest
import torch
from torch import nn

from lib.ensemble import Ensemble
from lib.networks import mlp, split_parameters
from lib.optimizers import SGD


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loss_of(module, x):
    return module(x).square().mean()


def test_one_network_moves_as_with_the_sgd_of_torch():
    mine = mlp((4, 5, 2), seeded(), batch_norm=True).double()
    theirs = copy.deepcopy(mine)
    x = torch.randn(8, 4, dtype=torch.float64, generator=seeded())
    optimizers = SGD(mine.parameters(), lr=0.1), torch.optim.SGD(theirs.parameters(), lr=0.1)
    for module, optimizer in zip((mine, theirs), optimizers, strict=True):
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(module, x).backward()
            optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_every_run_and_every_group_moves_at_its_own_rate():
    ensemble = Ensemble([mlp((4, 5, 2), seeded(s), batch_norm=True).double() for s in range(3)])
    before = copy.deepcopy(ensemble)
    weights, normalization = split_parameters(ensemble)
    rates = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    optimizer = SGD([{"params": weights, "lr": rates}, {"params": normalization}], lr=0.5)
    x = torch.randn(8, 4, dtype=torch.float64, generator=seeded())
    ensemble.losses(lambda out, _: out.square().mean(), x, x).sum().backward()
    optimizer.step()
    assert weights[0].grad.any()
    assert normalization[0].grad.any()
    in_weights = {id(p) for p in weights}
    for p, old in zip(ensemble.parameters(), before.parameters(), strict=True):
        for s in range(3):
            rate = rates[s] if id(p) in in_weights else 0.5
            torch.testing.assert_close(p[s], old[s] - rate * p.grad[s], rtol=1e-14, atol=1e-14)


def test_a_parameter_without_gradient_stays():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    SGD([p, q], lr=0.5).step()
    assert p.tolist() == [0.5, 0.5]
    assert q.tolist() == [1.0, 1.0]


def test_rates_follow_the_type_of_the_parameters():
    p = nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones(2, 3)
    SGD([p], lr=torch.tensor([0.5, 0.25], dtype=torch.float64)).step()
    assert p.dtype == torch.float32
    assert p[:, 0].tolist() == [0.5, 0.75]


def test_state_survives_a_file_read_without_code():
    p = nn.Parameter(torch.ones(2, 3))
    file = io.BytesIO()
    torch.save(SGD([p], lr=torch.tensor([0.5, 0.25])).state_dict(), file)
    file.seek(0)
    other = SGD([p], lr=torch.tensor([1.0, 1.0]))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["lr"].tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (-1, "lr must be positive and finite, got -1"),
        (0.0, r"lr must be positive and finite, got 0\.0"),
        (float("nan"), "lr must be positive and finite, got nan"),
        (torch.tensor([0.5, -2.0]), r"lr must be positive and finite in every run, got \[-2\.0\]"),
        (torch.tensor([0.5, float("inf")]), r"lr must be positive and finite in every run, got \[inf\]"),
        (torch.tensor([0.5, 0.1, 0.2]), r"lr must have one entry for each run, got shape \(3,\) .* \(2, 3\)"),
        (torch.tensor(0.5), r"lr must be a number or a tensor of shape \(S,\), got shape \(\)"),
    ],
)
def test_bad_rates_are_named(lr, message):
    with pytest.raises(ValueError, match=message):
        SGD([nn.Parameter(torch.ones(2, 3))], lr=lr)
