"""Learning-rate schedules as pure functions of the progress through training."""

import math


def cosine(progress: float) -> float:
    """Cosine decay: 1 at progress 0, 0 at progress 1."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
