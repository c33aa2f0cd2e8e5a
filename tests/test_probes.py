"""kNN and linear probes against plain reference implementations, and the held-out split."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import probes, seeding


def clusters(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    return centres[labels] + 0.8 * torch.randn(count, 8, generator=generator), labels


def test_knn_accuracy_equals_a_plain_implementation():
    (bank, bank_labels), (queries, labels) = clusters(60), clusters(40, 1)
    correct = 0
    for query, label in zip(queries, labels, strict=True):
        cosines = [float(F.cosine_similarity(query, key, dim=0)) for key in bank]
        nearest = sorted(range(60), key=lambda i: -cosines[i])[:7]
        scores = [0.0, 0.0, 0.0]
        for i in nearest:
            scores[int(bank_labels[i])] += 2.718281828459045 ** (cosines[i] / 0.1)
        correct += scores.index(max(scores)) == int(label)
    train_set, test_set = probes.Labelled(bank, bank_labels), probes.Labelled(queries, labels)
    accuracy = probes.knn_accuracy(train_set, test_set, 3, k=7)
    assert 60 < accuracy < 100 and accuracy == pytest.approx(100 * correct / 40)
    assert probes.knn_accuracy(train_set, test_set, 3, k=1000) > 33


def test_linear_probe_equals_autograd_and_sgd_at_each_learning_rate():
    features, labels = clusters(32)
    rates = torch.tensor([0.1, 1.0])
    fitted = probes.fit_linear(probes.Labelled(features, labels), 3, rates, seed=4, epochs=2, batch=16)
    for rate, weights in zip(rates.tolist(), fitted, strict=True):
        layer = nn.Linear(8, 3)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        for epoch in range(2):
            order = seeding.permutation(4, "linear probe", epoch, 32, "cpu")
            for step, rows in enumerate(order.view(2, 16)):
                optimizer.param_groups[0]["lr"] = rate * probes.cosine((epoch + step / 2) / 2)
                optimizer.zero_grad()
                F.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimizer.step()
        torch.testing.assert_close(weights[:-1], layer.weight.T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights[-1], layer.bias, atol=1e-5, rtol=1e-4)


def test_the_learning_rate_is_chosen_on_the_held_out_tenth_not_on_the_test_set(monkeypatch):
    train_set, test_set = probes.Labelled(*clusters(200)), probes.Labelled(*clusters(50, 1))
    split = seeding.held_out_split(200, "cpu", 0)
    evaluated_rows, fits = [], []
    real_fit = probes.fit_linear

    def accuracy_per_rate(features, labels, weights):
        evaluated_rows.append(len(features))
        return torch.tensor([0.2, 0.9, 0.1, 0.3, 0.3, 0.3])[: len(weights)]

    def fit_linear(train, classes, learning_rates, seed):
        fits.append((len(train.labels), learning_rates.tolist()))
        return real_fit(train, classes, learning_rates, seed)

    monkeypatch.setattr(probes, "accuracy_per_rate", accuracy_per_rate)
    monkeypatch.setattr(probes, "fit_linear", fit_linear)
    probes.linear_accuracy(train_set, test_set, 3, split, 0)
    assert evaluated_rows == [20, 50]
    assert fits == [(180, pytest.approx([0.01, 0.03, 0.1, 0.3, 1.0, 3.0])), (200, pytest.approx([0.03]))]


def test_linear_accuracy_does_not_depend_on_the_feature_scale():
    (features, labels), (test, test_labels) = clusters(200), clusters(100, 1)
    split = seeding.held_out_split(200, "cpu", 0)
    small, unscaled, large = (
        probes.linear_accuracy(
            probes.Labelled(scale * features, labels), probes.Labelled(scale * test, test_labels), 3, split, 0
        )
        for scale in (1e-4, 1.0, 1e3)
    )
    assert small == pytest.approx(unscaled, abs=1) and unscaled == pytest.approx(large, abs=1) and unscaled > 70


def test_held_out_split_is_fixed_sorted_and_one_tenth():
    rest, held_out = seeding.held_out_split(5000, "cpu", 0)
    assert len(held_out) == 500 and torch.equal(held_out, seeding.held_out_split(5000, "cpu", 0)[1])
    assert torch.equal(torch.cat([rest, held_out]).sort().values, torch.arange(5000))
    assert (rest.diff() > 0).all() and (held_out.diff() > 0).all() and 150 < (held_out < 2500).sum() < 350
