"""Intervals and verdicts compared with scipy, and edge cases: one seed, zero variance, unequal n."""

import math

import numpy as np
import pytest
from scipy import stats

from common.study.statistics import Difference, paired, student_t_quantile, summary, verdict, welch

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
    result = summary(values)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert (result.mean, result.sd, result.n) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)), n)
    assert (result.low, result.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (5, 5), (5, 2), (10, 4)])
def test_welch_equals_scipy(n, m):
    one, other = RNG.normal(60, 4, n), RNG.normal(58, 0.5, m)
    result = welch(one, other)
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    assert result.mean == pytest.approx(one.mean() - other.mean())
    assert (result.low, result.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (result.n, result.n_reference) == (n, m)


def test_paired_equals_scipy():
    reference = RNG.normal(60, 3, 5)
    values = reference - 2 + RNG.normal(0, 0.5, 5)
    result, correlation = paired(values, reference)
    expected = stats.ttest_rel(values, reference).confidence_interval()
    assert (result.low, result.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert correlation == pytest.approx(stats.pearsonr(values, reference).statistic)
    with pytest.raises(ValueError, match="cannot pair"):
        paired([1.0, 2.0], [1.0])


def test_one_seed_has_no_interval():
    only = summary([3.5])
    assert (only.mean, only.sd, only.low, only.high) == (3.5, None, None, None)
    for result in (welch([3.0], [1.0, 2.0]), welch([1.0, 2.0], [0.0]), paired([3.0], [2.0])[0]):
        assert result.low is None and result.high is None
        assert verdict(result, margin=100.0).startswith("not resolved at n = 1") or result.n == 2
    assert verdict(welch([1.0, 2.0], [0.0])) == "not resolved at n = 2 and 1"


def test_zero_variance_gives_an_interval_of_zero_width():
    flat = summary([0.1, 0.1, 0.1])
    assert (flat.mean, flat.sd, flat.low, flat.high) == (0.1, 0.0, 0.1, 0.1)
    assert welch([0.1] * 3, [0.1] * 5) == Difference(0.0, 0.0, 0.0, 3, 5)
    apart = welch([10.0, 10.0], [0.0, 0.0])
    assert (apart.low, apart.high, verdict(apart)) == (10.0, 10.0, "higher")
    one_side = welch([10.0, 10.0, 10.0], [1.0, 2.0, 3.0])
    assert one_side.low == pytest.approx(8 - stats.t.ppf(0.975, 2) / math.sqrt(3))
    assert paired([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])[1] is None


def test_tiny_variances_do_not_underflow():
    result = welch([1e-120, 2e-120, 3e-120], [4e-120, 5e-120, 9e-120])
    assert result.low < result.mean < result.high


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_raises_on_empty_or_non_finite_values(values):
    with pytest.raises(ValueError, match="finite values"):
        summary(values)


@pytest.mark.parametrize(
    ("low", "high", "margin", "word"),
    [
        (-2.0, -0.1, None, "lower"),
        (0.1, 2.0, None, "higher"),
        (-0.4, 0.5, 0.5, "no difference"),
        (-0.4, 0.6, 0.5, "not resolved at n = 5"),  # exceeds the margin
        (-0.6, 0.4, 0.5, "not resolved at n = 5"),
        (-0.4, 0.5, None, "not resolved at n = 5"),  # no margin was declared
        (-0.3, -0.1, 0.5, "lower"),  # excludes zero: never "no difference"
        (0.0, 0.0, None, "not resolved at n = 5"),
    ],
)
def test_verdict_follows_from_interval_and_margin(low, high, margin, word):
    assert verdict(Difference((low + high) / 2, low, high, 5, 5), margin) == word
