"""Measurements on frozen features: kNN and linear-probe accuracy (in percent), and collapse metrics.

The collapse metrics `std_ratio`, `mean_cosine` and `effective_rank` are computed in float64 on rows scaled to unit
length.
"""

import math
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
    stages: Sequence[nn.Module], data: images.Images | image_folder.StreamedImages, split: str
) -> list[Tensor]:
    """Return the outputs (N, D) of all stages in eval mode, then the labels (N,); each stage gets the previous output.

    Features are always float32: if the std over images is 1/1000 of the mean magnitude, bfloat16 rounding would remove
    a third of the std, and the collapse metrics would measure this rounding. Each rank computes its share of the rows;
    all ranks get all rows, ordered by rank. Afterwards the stages are in train mode.
    """
    for stage in stages:
        stage.eval()
    blocks: list[list[Tensor]] = [[] for _ in range(len(stages) + 1)]
    for x, labels in data.batches(split, *devices.rank_and_world()):
        for stage, outputs in zip(stages, blocks, strict=False):
            x = stage(x)
            outputs.append(x)
        blocks[-1].append(labels)
    for stage in stages:
        stage.train()
    # Free the blocks of one stage before joining the next: ImageNet's features take 10 GB.
    joined = []
    while blocks:
        joined.append(devices.gather_rows(torch.cat(blocks.pop(0))))
    return joined


def knn_accuracy(bank: Labelled, queries: Labelled, classes: int, k: int = 200, tau: float = 0.1) -> float:
    """Return the accuracy in percent of weighted k-nearest-neighbour classification by cosine similarity.

    score(c) = sum over the k most similar v_j of class c of exp(cos(u, v_j) / tau) (Wu et al., CVPR 2018).
    `k` is limited to the size of the bank.
    """
    keys, unit_queries = F.normalize(bank.features.float(), dim=1), F.normalize(queries.features.float(), dim=1)
    correct = torch.zeros((), device=keys.device)
    for block, labels in zip(unit_queries.split(512), queries.labels.split(512), strict=True):
        cosines, nearest = (block @ keys.T).topk(min(k, len(keys)), dim=1)
        votes = F.one_hot(bank.labels[nearest], classes).float()  # (block, k, classes)
        scores = ((cosines / tau).exp().unsqueeze(1) @ votes).squeeze(1)
        correct += (scores.argmax(1) == labels).sum()
    return 100.0 * correct.item() / len(unit_queries)


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Return all inputs (N, D), minus mean, divided by std (at least 1e-12) of each feature in `train`."""
    mean, std = train.float().mean(0), train.float().std(0).clamp_min(1e-12)
    return [(features.float() - mean) / std for features in (train, *others)]


def fit_linear(
    train: Labelled, classes: int, learning_rates: Tensor, seed: int, epochs: int = 50, batch: int = 256
) -> Tensor:
    """Fit softmax regression at learning rates (R,) in parallel.

    Returns weights (R, D + 1, classes), whose last row is the bias. SGD with momentum 0.9, cosine schedule, no weight
    decay, zero initialisation.
    """
    ones = train.features.new_ones(len(train.features), 1)
    features, labels = torch.cat([train.features, ones], 1), train.labels
    weights = features.new_zeros(len(learning_rates), features.shape[1], classes)
    momentum = torch.zeros_like(weights)
    batch = min(batch, len(features))
    steps_per_epoch = len(features) // batch
    for epoch in range(epochs):
        order = seeding.permutation(seed, "linear probe", epoch, len(features), features.device)
        for step, rows in enumerate(order[: steps_per_epoch * batch].view(steps_per_epoch, batch)):
            x, y = features[rows], F.one_hot(labels[rows], classes)
            gradient = x.T @ ((x @ weights).softmax(-1) - y) / batch  # of the cross-entropy, (R, D + 1, classes)
            momentum.mul_(0.9).add_(gradient)
            decay = cosine((epoch + step / steps_per_epoch) / epochs)
            weights -= learning_rates.view(-1, 1, 1) * decay * momentum
    return weights


def linear_accuracy(
    train: Labelled,
    test: Labelled,
    classes: int,
    selection_indices: tuple[Tensor, Tensor],
    seed: int,
) -> float:
    """Return the test accuracy in percent of a linear classifier on standardised features.

    `selection_indices`: (fit, held-out) row indices of the training set, from `seeding.held_out_split`. Classifiers
    are fitted on the fit rows at the learning rates 0.01, 0.03, 0.1, 0.3, 1 and 3, and the rate with the best accuracy
    on the held-out rows is selected. The final classifier is fitted on the whole training set.
    """
    learning_rates = torch.tensor((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), device=train.features.device)
    fitted, held_out = (Labelled(train.features[rows], train.labels[rows]) for rows in selection_indices)
    fit_features, eval_features = standardise(fitted.features, held_out.features)
    trial = fit_linear(Labelled(fit_features, fitted.labels), classes, learning_rates, seed)
    best = accuracy_per_rate(eval_features, held_out.labels, trial).argmax(0, keepdim=True)
    fit_features, eval_features = standardise(train.features, test.features)
    weights = fit_linear(Labelled(fit_features, train.labels), classes, learning_rates[best], seed)
    return 100.0 * accuracy_per_rate(eval_features, test.labels, weights).item()


def accuracy_per_rate(features: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the accuracy in [0, 1] at each learning rate, (R,): features (N, D), weights (R, D + 1, classes)."""
    scores = features @ weights[:, :-1] + weights[:, -1:]
    return (scores.argmax(-1) == labels).float().mean(-1)


def std_ratio(z: Tensor) -> float:
    """Return sqrt(D) times the standard deviation over the rows of z (N, D), averaged over channels.

    1 for isotropic features, 0 if all rows are equal. SimSiam, section 4.1: the unit vectors of a Gaussian have
    standard deviation 1 / sqrt(D).
    """
    return F.normalize(z.double(), dim=1).std(0).mean().item() * z.shape[1] ** 0.5


def mean_cosine(z: Tensor) -> float:
    """Return the mean cosine similarity between different rows of z (N, D)."""
    unit, count = F.normalize(z.double(), dim=1), len(z)
    return ((unit.sum(0).square().sum().item()) - count) / (count * (count - 1))


def effective_rank(z: Tensor) -> float:
    """Return exp of the entropy of the normalised singular values of the centred rows of z (N, D), from 1 to D.

    NaN if a value of z is not finite.
    """
    if not z.isfinite().all():
        return math.nan
    unit = F.normalize(z.double(), dim=1)
    centred = unit - unit.mean(0)
    # Both products have the same non-zero eigenvalues; take the smaller one.
    gram = centred.T @ centred if len(z) >= z.shape[1] else centred @ centred.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-300)
    return torch.special.entr(share).sum().exp().item()
