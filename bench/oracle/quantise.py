"""Queries as a service that takes 8-bit images sees them."""

from torch import Tensor

from bench.errors import ConfigError
from bench.threat import Threat, format_eps

SLACK = 1e-4  # of a level: what float32 may be off where a level touches the ball


def eight_bit(x: Tensor, clean: Tensor, threat: Threat, radius: float) -> Tensor:
    """Whole grey levels for ``x``, inside the ball where ``x`` is; gradients pass as if nothing had happened.

    In linf each pixel goes to the nearest level inside the ball. In other norms going to the nearest one can lengthen
    a step, so each pixel goes to the next level towards ``clean``, which has to be of whole levels itself.

    Args:
        x, clean: images (N, C, H, W), any and in [0, 1].
        threat: the norm of the ball around ``clean``.
        radius: of that ball, which is infinite for queries that may go anywhere.
    """
    if threat.norm == "linf":
        levels = (x * 255).round().clamp(*_span(clean, radius))
    else:
        levels = (clean * 255).round() + ((x - clean) * 255).trunc()
    return x + (levels.clamp(0, 255) / 255 - x).detach()


def check_levels(clean: Tensor, threat: Threat) -> None:
    """Refuse images (N, C, H, W) in [0, 1] around which a ball need not hold any image of whole grey levels.

    Raises:
        ConfigError: with ``quantise`` these images cannot be attacked in this threat.
    """
    if threat.norm != "linf":
        if ((clean * 255).round() - clean * 255).abs().gt(10 * SLACK).any():
            raise ConfigError(
                f"quantise: the images are not of whole grey levels, so rounding them may leave the {threat} ball; "
                "store them as uint8, use linf, or leave quantise out"
            )
        return
    low, high = _span(clean, threat.eps)
    if (low > high).any():
        raise ConfigError(
            f"quantise: the images are not of whole grey levels, and within {format_eps(threat.eps, 'linf')} of some "
            "pixels there is none; store them as uint8, give an eps of 0.5/255 or more, or leave quantise out"
        )


def _span(clean: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """The lowest and highest level that each pixel can take in the linf ball and the box."""
    low = ((clean - radius) * 255 - SLACK).ceil().clamp(min=0)
    high = ((clean + radius) * 255 + SLACK).floor().clamp(max=255)
    return low, high
