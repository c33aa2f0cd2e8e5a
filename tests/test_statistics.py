"""Intervals and verdicts compared with scipy, and edge cases: one seed, zero variance, unequal n."""

import math

import numpy as np
import pytest
from scipy import stats

from common.study.statistics import Difference, holm, mean_interval, paired, seeds_needed, student_t_quantile, verdict

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("p", [0.0005, 0.3, 0.51, 0.975, 0.9999])
def test_quantile_equals_scipy(p):
    for df in [*range(1, 201), 1.02, 1.5, 2.71, 4.4, 7.99, 33.3, 1e4]:
        assert student_t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-8, abs=1e-10), df


def test_quantile_equals_closed_forms_at_one_and_two_degrees_of_freedom():
    assert student_t_quantile(0.975, 1) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-12)  # Cauchy
    p = 0.9  # closed form at df = 2
    assert student_t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-12)


@pytest.mark.parametrize(("p", "df"), [(0, 5), (1, 5), (0.5, 0), (0.5, -1), (float("nan"), 3)])
def test_quantile_raises_outside_its_domain(p, df):
    with pytest.raises(ValueError, match="0 < p < 1"):
        student_t_quantile(p, df)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_summary_equals_scipy(n):
    values = RNG.normal(60, 3, n)
    result = mean_interval(values)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (result.mean, result.sd, result.n) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)), n)
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_paired_equals_scipy(n):
    reference = RNG.normal(60, 3, n)
    values = reference - 1 + RNG.normal(0, 0.5, n)
    result = paired(values, reference)
    expected = stats.ttest_rel(values, reference)
    low, high = expected.confidence_interval()
    assert (result.low, result.high, result.p) == (
        pytest.approx(low), pytest.approx(high), pytest.approx(expected.pvalue, rel=1e-9))  # fmt: skip
    assert result.sd == pytest.approx((values - reference).std(ddof=1)) and result.n == n
    if n > 2:
        assert result.correlation == pytest.approx(stats.pearsonr(values, reference).statistic)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([1.0, 2.0], [1.0])


def test_pairing_removes_what_the_seeds_share():
    """Seeds differ by far more than arms: only paired differences show the effect."""
    reference = [50.0, 70.0, 60.0, 40.0, 55.0]
    result = paired([value - 1 - 0.1 * seed for seed, value in enumerate(reference)], reference)
    assert verdict(result, "higher") == "worse" and result.correlation > 0.99


def test_one_seed_has_no_interval():
    only = mean_interval([3.5])
    assert (only.mean, only.sd, only.low, only.high) == (3.5, None, None, None)
    result = paired([3.0], [2.0])
    assert (result.mean, result.n) == (1.0, 1) and verdict(result, "higher", margin=100.0) == "one seed"
    assert (result.low, result.high, result.sd, result.p, result.correlation) == (None,) * 5


def test_zero_variance_gives_an_interval_of_zero_width():
    flat = mean_interval([0.1, 0.1, 0.1])
    assert (flat.mean, flat.sd, flat.low, flat.high) == (0.1, 0.0, 0.1, 0.1)
    equal, apart = paired([0.1] * 3, [0.1] * 3), paired([11.0, 12.0], [1.0, 2.0])
    assert (equal.mean, equal.low, equal.high, equal.p) == (0.0, 0.0, 0.0, 1.0)
    assert (apart.low, apart.high, apart.p, verdict(apart, "higher")) == (10.0, 10.0, 0.0, "better")
    assert paired([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]).correlation is None


def test_tiny_variances_do_not_underflow():
    result = paired([1e-120, 2e-120, 4e-120], [4e-120, 5e-120, 9e-120])
    assert result.low < result.mean < result.high and 0 < result.p < 0.05


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_raises_on_empty_or_non_finite_values(values):
    with pytest.raises(ValueError, match="finite values"):
        mean_interval(values)


@pytest.mark.parametrize(
    ("low", "high", "margin", "word"),
    [
        (-2.0, -0.1, None, "worse"),
        (0.1, 2.0, None, "better"),
        (-0.4, 0.5, 0.5, "no difference"),
        (-0.3, -0.1, 0.5, "no difference"),  # it excludes zero, but everything in it is too small to matter
        (-0.4, 0.6, 0.5, "unclear"),  # exceeds the margin
        (-0.6, 0.4, 0.5, "unclear"),
        (-0.4, 0.5, None, "unclear"),  # no margin was declared
        (-0.6, -0.1, 0.5, "worse"),
        (0.0, 0.0, None, "unclear"),
    ],
)
def test_verdict_follows_from_interval_and_margin(low, high, margin, word):
    result = Difference((low + high) / 2, 1.0, 5, low, high, 0.5, None)
    assert verdict(result, "higher", margin) == word
    opposite = {"worse": "better", "better": "worse"}
    assert verdict(result, "lower", margin) == opposite.get(word, word)
    neutral = {"worse": "lower", "better": "higher"}
    assert verdict(result, "", margin) == neutral.get(word, word)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0, 2.5, 10.0])
def test_seeds_needed_is_the_least_number_that_reaches_the_margin(ratio):
    n = seeds_needed(ratio, 1.0)

    def half_width(n):
        return stats.t.ppf(0.975, n - 1) * ratio / math.sqrt(n)

    assert half_width(n) <= 1 and (n == 2 or half_width(n - 1) > 1)


def test_holm_rejects_step_by_step():
    """0.01 <= 0.05 / 4; 0.015 <= 0.05 / 3; 0.03 > 0.05 / 2, so it and all larger ones stay."""
    assert holm({"a": 0.015, "b": 0.01, "c": 0.03, "d": 0.04}) == {"a", "b"}
    assert holm({"a": 0.04}) == {"a"} and holm({"a": 0.06}) == set() and holm({}) == set()
    assert holm(dict.fromkeys("abcd", 0.0125)) == set("abcd")
    assert holm({"a": 0.02, "b": 0.001, "c": 0.02}) == set("abc")  # Bonferroni would keep b alone
