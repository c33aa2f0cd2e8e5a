"""Measurements on frozen features: k nearest neighbours and a linear classifier (accuracies in percent), and collapse.

The collapse metrics, `std_ratio`, `mean_cosine` and `effective_rank`, are in float64, on rows scaled to length 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import devices, image_folder, images, seeding
from common.schedules import cosine


class Labelled(NamedTuple):
    """Features (N, D) float32 and their labels (N,) int64."""

    features: Tensor
    labels: Tensor


@torch.no_grad()
def extract_features(
    stages: Sequence[nn.Module], data: images.Images | image_folder.StreamedImages, part: str
) -> list[Tensor]:
    """The output (N, D) of every stage, each fed with the one before, in eval mode; and the labels (N,) last.

    In float32 whatever training used: rounded to bfloat16, features that differ by a thousandth of their size lose a
    third of their spread, and a collapse meter would report what the rounding did. Each rank does its share of the
    batches; every rank gets all rows. The stages go back to train mode.
    """
    for stage in stages:
        stage.eval()
    found: list[list[Tensor]] = [[] for _ in range(len(stages) + 1)]
    for x, labels in data.batches(part, *devices.rank_and_world()):
        for stage, outputs in zip(stages, found, strict=False):
            x = stage(x)
            outputs.append(x)
        found[-1].append(labels)
    for stage in stages:
        stage.train()
    rows = []
    while found:  # one list after the other is freed: ImageNet's features are 10 GB, and never all of them twice
        rows.append(devices.gather_rows(torch.cat(found.pop(0))))
    return rows


def knn_accuracy(bank: Labelled, queries: Labelled, classes: int, k: int = 200, tau: float = 0.1) -> float:
    """Weighted k-nearest-neighbour accuracy by cosine similarity, in percent.

    score(c) = sum over the k most similar v_j of class c of exp(cos(u, v_j) / tau) (Wu et al., CVPR 2018).
    k is cut to the size of the bank.
    """
    known, unknown = F.normalize(bank.features.float(), dim=1), F.normalize(queries.features.float(), dim=1)
    correct = torch.zeros((), device=known.device)
    for block, truth in zip(unknown.split(512), queries.labels.split(512), strict=True):
        cosines, nearest = (block @ known.T).topk(min(k, len(known)), dim=1)
        votes = F.one_hot(bank.labels[nearest], classes).float()  # (block, k, classes)
        scores = ((cosines / tau).exp().unsqueeze(1) @ votes).squeeze(1)
        correct += (scores.argmax(1) == truth).sum()
    return 100.0 * correct.item() / len(unknown)


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Subtract the training mean and divide by the training deviation of every feature, (N, D) each."""
    mean, deviation = train.float().mean(0), train.float().std(0).clamp_min(1e-12)
    return [(features.float() - mean) / deviation for features in (train, *others)]


def fit_linear(train: Labelled, classes: int, rates: Tensor, seed: int, epochs: int = 50, batch: int = 256) -> Tensor:
    """Softmax regression at several learning rates at once: weights (R, D + 1, classes), the last row the bias.

    SGD with momentum 0.9, cosine schedule, no weight decay, zero start. rates (R,).
    """
    features, labels = torch.cat([train.features, train.features.new_ones(len(train.features), 1)], 1), train.labels
    weights = features.new_zeros(len(rates), features.shape[1], classes)
    momentum = torch.zeros_like(weights)
    batch = min(batch, len(features))
    steps = len(features) // batch
    for epoch in range(epochs):
        order = seeding.permutation(seed, "linear probe", epoch, len(features), features.device)
        for step, rows in enumerate(order[: steps * batch].view(steps, batch)):
            x, y = features[rows], F.one_hot(labels[rows], classes)
            slope = x.T @ ((x @ weights).softmax(-1) - y) / batch  # d cross-entropy / d weights, (R, D + 1, classes)
            momentum.mul_(0.9).add_(slope)
            weights -= rates.view(-1, 1, 1) * cosine((epoch + step / steps) / epochs) * momentum
    return weights


def linear_accuracy(
    train: Labelled, test: Labelled, classes: int, parts: tuple[Tensor, Tensor], seed: int, rates: Tensor | None = None
) -> float:
    """Test accuracy in percent of a linear classifier on standardised features.

    `parts` are row numbers of the training set: on the second the learning rate is chosen, among all `rates` (R,;
    default 0.01 to 3) trained side by side on the first; the classifier is then trained on the whole training set at
    the chosen one.
    """
    if rates is None:
        rates = torch.tensor((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), device=train.features.device)
    fitted, held_out = (Labelled(train.features[part], train.labels[part]) for part in parts)
    known, unknown = standardise(fitted.features, held_out.features)
    trial = fit_linear(Labelled(known, fitted.labels), classes, rates, seed)
    best = correct_share(unknown, held_out.labels, trial).argmax(0, keepdim=True)
    known, unknown = standardise(train.features, test.features)
    weights = fit_linear(Labelled(known, train.labels), classes, rates[best], seed)
    return 100.0 * correct_share(unknown, test.labels, weights).item()


def correct_share(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Share of rows classified correctly at every learning rate, (R,): features (N, D), weights (R, D + 1, classes)."""
    scores = features @ weights[:, :-1] + weights[:, -1:]
    return (scores.argmax(-1) == labels).float().mean(-1)


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
