"""How widely a batch of representations spreads: the meters of collapse. All in float64, on rows scaled to length 1."""

import torch
import torch.nn.functional as F
from torch import Tensor


def std_ratio(z: Tensor) -> float:
    """Deviation over the rows of z (N, D), mean over the channels, times sqrt(D): 1 when isotropic, 0 at a constant.

    SimSiam, section 4.1: a Gaussian's unit vectors have deviation 1 / sqrt(D).
    """
    return F.normalize(z.double(), dim=1).std(0).mean().item() * z.shape[1] ** 0.5


def mean_cosine(z: Tensor) -> float:
    """Mean cosine between different rows of z (N, D)."""
    unit, count = F.normalize(z.double(), dim=1), len(z)
    return ((unit.sum(0).square().sum().item()) - count) / (count * (count - 1))


def effective_rank(z: Tensor) -> float:
    """exp of the entropy of the normalised singular values of the centred rows of z (N, D), 1 to D."""
    unit = F.normalize(z.double(), dim=1)
    centred = unit - unit.mean(0)
    gram = centred.T @ centred if len(z) >= z.shape[1] else centred @ centred.T  # equal but for zeros
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-300)
    return torch.special.entr(share).sum().exp().item()
