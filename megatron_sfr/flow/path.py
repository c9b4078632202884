"""The straight (rectified-flow) path between noise x_0 and data x_1.

Shapes: any leading axes; the last axis D is the dimension of the space. t broadcasts against x[..., :1].
"""

from torch import Tensor


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Point and velocity of the straight path: x_t = (1 - t) x_0 + t x_1,  dx_t/dt = x_1 - x_0.

    Lipman et al. 2023 (arXiv 2210.02747) with sigma_min = 0; SFR (arXiv 2605.27971) writes z_tau. t in [0, 1].
    """
    return (1 - t) * x_0 + t * x_1, x_1 - x_0
