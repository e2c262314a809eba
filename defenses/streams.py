"""The random numbers that come with each query of a random output defense."""

from torch import Tensor

from bench.rng import SampleRng


def streams(rng: SampleRng | None, x: Tensor, name: str) -> SampleRng:
    """``rng``, held against the images ``x`` (B, C, H, W) that came with it; ``name`` is the defense.

    Raises:
        ValueError: no ``rng``, or one of another length.
    """
    if rng is None or len(rng) != len(x):
        raise ValueError(
            f"{name} got {'no' if rng is None else len(rng)} random streams for {len(x)} images; call model(x, rng) "
            "with a SampleRng that has one for each row, new at each query"
        )
    return rng
