import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.losses import CrossEntropy, Exponential, Logistic, Squared, SquaredHinge

LOSSES = {
    "squared": Squared(),
    "exponential": Exponential(0.5),
    "exponential, c = 4": Exponential(4.0),
    "cross-entropy": CrossEntropy(),
    "squared hinge": SquaredHinge(0.5),
    "logistic": Logistic(),
}
seeds = st.integers(0, 2**32 - 1)


def data(loss, seed, shape=(3, 2, 7)):
    generator = torch.Generator().manual_seed(seed)
    H = torch.randn(shape, generator=generator, dtype=torch.float64)
    Y = torch.randn(shape[-2:], generator=generator, dtype=torch.float64)
    if isinstance(loss, CrossEntropy):
        return 0.1 + 0.8 * torch.sigmoid(H), (Y > 0).double()
    return H, Y.sign() if isinstance(loss, (SquaredHinge, Logistic)) else Y


def by_sample(loss, H, Y):
    """The values of one run, written sample by sample."""
    d, N = H.shape
    squares = sum((Y[i, n] - H[i, n]) ** 2 for i in range(d) for n in range(N)) / N
    if isinstance(loss, Squared):
        return squares
    if isinstance(loss, Exponential):
        return loss.c * torch.exp(squares / loss.c)
    if isinstance(loss, CrossEntropy):
        return d * F.binary_cross_entropy(H, Y)
    if isinstance(loss, SquaredHinge):
        return sum(max(0.0, 1 - Y[i, n] * H[i, n]) ** 2 for i in range(d) for n in range(N)) / (2 * loss.c * N)
    return sum(torch.log(1 + torch.exp(-(Y[:, n] @ H[:, n]))) for n in range(N)) / N


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds)
@settings(deadline=None, max_examples=15)
def test_value_is_the_definition(name, seed):
    loss = LOSSES[name]
    H, Y = data(loss, seed)
    expected = torch.stack([by_sample(loss, h, Y) for h in H])
    torch.testing.assert_close(loss.value(H, Y), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds)
@settings(deadline=None, max_examples=15)
def test_gradient_is_that_of_autograd(name, seed):
    loss = LOSSES[name]
    H, Y = data(loss, seed)
    H.requires_grad_()
    (expected,) = torch.autograd.grad(loss.value(H, Y).sum(), H)
    torch.testing.assert_close(loss.gradient(H, Y), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@given(seed=seeds)
@settings(deadline=None, max_examples=15)
def test_curvature_and_coupling_make_the_hessian_of_autograd(name, seed):
    loss = LOSSES[name]
    H, Y = data(loss, seed, (2, 3))
    expected = torch.autograd.functional.hessian(lambda h: loss.value(h, Y), H)
    mine = torch.zeros_like(expected)
    for n, block in enumerate(loss.curvature(H, Y)):
        mine[:, n, :, n] = block
    g = loss.gradient(H, Y)
    mine = mine + loss.coupling(H, Y) * torch.einsum("in,km->inkm", g, g)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-13)


def test_exponential_tends_to_squared():
    H, Y = data(Squared(), 0)
    loss = Exponential(1e7)
    torch.testing.assert_close(loss.value(H, Y) - loss.c, Squared().value(H, Y), rtol=1e-5, atol=1e-5)


def test_cross_entropy_at_certain_outputs():
    H, Y = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    assert CrossEntropy().value(H, Y) == 0
    assert CrossEntropy().gradient(H, Y).tolist() == [[0.5, -0.5]]
    assert CrossEntropy().value(1 - H, Y) == float("inf")


def test_large_margins_do_not_overflow():
    H, Y = torch.tensor([[1e4, -1e4]]), torch.tensor([[1.0, 1.0]])
    assert Logistic().value(H, Y) == 5e3
    assert Logistic().gradient(H, Y).tolist() == [[0.0, -0.5]]


@pytest.mark.parametrize("name", LOSSES)
def test_targets_must_fit_outputs(name):
    with pytest.raises(ValueError, match=r"Y must have the rows and columns of H, \(2, 7\).*got \(2, 5\)"):
        LOSSES[name].value(torch.ones(3, 2, 7), torch.ones(2, 5))


@pytest.mark.parametrize("loss", [Exponential, SquaredHinge])
@pytest.mark.parametrize("c", [0, -1.0, float("inf"), float("nan")])
def test_a_bad_constant_is_named(loss, c):
    with pytest.raises(ValueError, match=f"c must be positive and finite, got {c}"):
        loss(c)


@pytest.mark.parametrize(
    ("loss", "Y", "message"),
    [
        (Squared(), [[float("nan"), 1.0]], r"Y must be finite, got \[nan\]"),
        (CrossEntropy(), [[0.0, 1.5]], r"Y must be in \[0, 1\], got \[1\.5\]"),
        (SquaredHinge(1.0), [[0.0, 1.0]], r"Y must be -1 or 1, got \[0\.0\]"),
        (Logistic(), [[0.5, 1.0]], r"Y must be -1 or 1, got \[0\.5\]"),
    ],
)
def test_targets_outside_of_the_loss_are_named(loss, Y, message):
    with pytest.raises(ValueError, match=message):
        loss.check_targets(torch.tensor(Y))
