"""Step sizes: one number, or a tensor with one for each run of an ensemble."""

from torch import Tensor


def check_rate(name: str, rate: Tensor | float) -> None:
    """Refuse a step size that is not positive and finite in every run, by the name of the argument."""
    if isinstance(rate, Tensor):
        if rate.ndim != 1:
            raise ValueError(f"{name} must be a number or a tensor of shape (S,), got shape {tuple(rate.shape)}")
        # A meta tensor has no values to look at.
        bad = rate[:0] if rate.is_meta else rate[~((rate > 0) & rate.isfinite())]
        if len(bad):
            raise ValueError(f"{name} must be positive and finite in every run, got {bad.tolist()}")
    elif not 0 < rate < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {rate}")
