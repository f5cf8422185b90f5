"""Equivalence, trend and agreement of volumes against worked examples, brute force and simulation.

Every function has an example whose arithmetic stands in the test, or one that is printed where the test says, and the
printed numbers are recomputed here by other code (scipy, statsmodels, enumeration).
"""
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sahlora.evaluation.statistics import bland_altman, concordance, equivalence, icc31, page_trend, spearman

# Peak expiratory flow, first readings, large and mini meter, L/min: Bland & Altman 1986, Lancet 327:307.
PEFR = (np.array([494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427.0]),
        np.array([512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451.0]))
# Four judges rate six targets: Shrout & Fleiss 1979, Psychol. Bull. 86:420, table 2.
JUDGES = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
# Lightness and quality of canned tuna: Hollander & Wolfe, table 8.1, and the example of R's cor.test.
TUNA = ([44.4, 45.9, 41.9, 53.3, 44.7, 44.1, 50.7, 45.2, 60.1], [2.6, 3.1, 2.5, 5.0, 3.6, 4.0, 5.2, 2.8, 3.8])
# Strength of cotton in three blocks at 144, 108, 72, 54, 36 lb of potash: Hollander & Wolfe, example 7.2 (R: NSM3).
COTTON = np.array([[7.46, 7.17, 7.76, 8.14, 7.63], [7.68, 7.57, 7.73, 8.15, 8.00], [7.21, 7.80, 7.74, 7.87, 7.93]])


# as good as

def test_equivalence_by_hand():
    "Six differences of 0.001 .. 0.006, a margin of 0.03: d + 0.03 is all above 0, d - 0.03 all below: p = 1/64 each."
    d = np.arange(1, 7) / 1000
    found = equivalence(d, 0 * d, 0.03)
    assert (found.p_lower, found.p_upper, found.p, found.equivalent) == (1 / 64, 1 / 64, 1 / 64, True)
    better = equivalence(d + 0.1, 0 * d, 0.03)
    assert better.noninferior and not better.equivalent and better.p == 1
    worse = equivalence(d - 0.1, 0 * d, 0.03)
    assert worse.p_worse == 1 / 64 and not worse.noninferior
    with pytest.raises(ValueError, match="margin"):
        equivalence(d, d, 0)


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_equivalence_is_the_90_percent_interval_within_the_margin(seed):
    rng = np.random.default_rng(seed)
    d = rng.normal(rng.normal(0, 0.02), 0.03, rng.integers(8, 40))
    found = equivalence(d, 0 * d, 0.03)
    assert found.equivalent == (-0.03 < found.interval[0] and found.interval[1] < 0.03)
    assert found.noninferior == (found.interval[0] > -0.03) and (found.p_worse < 0.05) == (found.interval[1] < -0.03)


@pytest.mark.slow
def test_equivalence_is_rarely_found_at_the_margin():
    rng = np.random.default_rng(1)
    found = [equivalence(0.03 + 0.02 * rng.standard_t(3, 30), np.zeros(30), 0.03).equivalent for _ in range(2000)]
    print(f"equivalence at the margin: {np.mean(found):.3f}")
    assert 0.02 < np.mean(found) < 0.06


# trend

def test_spearman_of_canned_tuna():
    """R's cor.test, method spearman: S = 48, p-value = 0.0968, rho = 0.6. By hand: S is the sum of squared differences
    of ranks, rho = 1 - 6 * 48 / (9 * 80); p counts all 9! orders with S of 48 or less, or of 240 - 48 or more."""
    found = spearman(*TUNA)
    assert found.rho == pytest.approx(0.6) and found.p == pytest.approx(0.0968, abs=5e-5)
    ranks = stats.rankdata(TUNA[0])
    assert ((ranks - stats.rankdata(TUNA[1])) ** 2).sum() == 48
    orders = np.array(list(itertools.permutations(range(1, 10))), dtype=np.int16)
    s = ((orders - np.arange(1, 10)) ** 2).sum(axis=1)
    assert found.p == pytest.approx(((s <= 48) | (s >= 240 - 48)).mean())
    half = 1.959964 * math.sqrt((1 + 0.36 / 2) / 6)  # Bonett & Wright 2000, by hand
    assert found.interval == pytest.approx((math.tanh(math.atanh(0.6) - half), math.tanh(math.atanh(0.6) + half)))


def test_spearman_at_its_ends():
    x = np.arange(8.0)
    assert spearman(x, x ** 3).p == pytest.approx(2 / math.factorial(8)) and spearman(x, x).interval is None
    assert spearman(x, 0 * x).note == "one column is constant" and spearman(x[:5], x[:5]).p is None
    y = np.random.default_rng(0).normal(size=40)
    assert spearman(np.arange(40), y).p == pytest.approx(stats.spearmanr(np.arange(40), y).pvalue)


def no_trend(blocks, k):
    "P(L = l) of `blocks` untied blocks of k, by counting the orders of one block and adding the blocks up."
    one = np.bincount([sum((i + 1) * rank for i, rank in enumerate(order)) for order in itertools.permutations(range(1, k + 1))])
    null = np.ones(1)
    for _ in range(blocks):
        null = np.convolve(null, one / one.sum())
    return null


def test_page_of_cotton():
    """Hollander & Wolfe 1999, p. 286: L = 158, expected 135, variance 75, z = 2.66, p = 0.0039. Three blocks get no p
    value here; the same blocks twice do, and it is the count of all orders."""
    found = page_trend(pd.DataFrame(COTTON))
    assert found.statistic == 158 and found.n == 3 and found.p_rising is None
    z = (158 - 3 * 5 * 36 / 4) / math.sqrt(3 * 25 * 6 * 24 / 144)
    assert z == pytest.approx(2.66, abs=0.005) and stats.norm.sf(z) == pytest.approx(0.0039, abs=1e-4)
    doubled = page_trend(pd.DataFrame(np.vstack([COTTON, COTTON])))
    assert doubled.statistic == 316 and doubled.p_rising == pytest.approx(no_trend(6, 5)[316:].sum())
    assert doubled.p_falling > 0.99


def test_page_of_teaching_methods():
    """Ten students rate three ways of teaching (example of scipy's page_trend_test): L = 133.5, p = 0.00182. The count of
    all orders without ties has whole L only; the tied 133.5 is taken as 133, the careful side."""
    table = [[3, 4, 3], [2, 2, 4], [3, 3, 5], [1, 3, 2], [2, 3, 2], [2, 4, 5], [1, 2, 4], [3, 4, 4], [2, 4, 5], [1, 3, 4]]
    found = page_trend(pd.DataFrame(table))
    assert found.statistic == 133.5 and found.p_rising == pytest.approx(no_trend(10, 3)[133:].sum())
    assert found.p_rising == pytest.approx(0.0018191, abs=1e-7)


def test_page_by_hand():
    "Six patients all rise over three: L = 6 * (1 + 4 + 9) = 84, one order in 6 per patient, so p = 1 / 6**6, rho 1."
    found = page_trend(pd.DataFrame(np.arange(6.0)[:, None] + [0, 0.1, 0.2]))
    assert (found.statistic, found.mean_rho) == (84, pytest.approx(1))
    assert found.p_rising == pytest.approx(6.0 ** -6) and found.p_falling == pytest.approx(1)


def test_page_mean_correlation_is_that_of_patients():
    data = np.random.default_rng(0).normal(size=(9, 4))
    found = page_trend(pd.DataFrame(data))
    assert found.mean_rho == pytest.approx(np.mean([stats.spearmanr(range(4), row).statistic for row in data]))
    assert page_trend(pd.DataFrame(data[:, ::-1])).p_rising == pytest.approx(found.p_falling)


# agreement of volumes

def test_bland_and_altman_of_peak_flow():
    """Bland & Altman 1986: mean difference -2.1, SD 38.8, limits -79.7 and 75.5; intervals of the bias -22.0 to 17.8,
    of the limits -114.3 to -45.1 and 40.9 to 110.1 L/min (they use 2 SD and se = sqrt(3 s^2 / n)). By other code: the
    bias and its interval are those of scipy's paired t test."""
    found, reference = bland_altman(*PEFR, factor=2, exact=False), stats.ttest_rel(*PEFR)
    assert found.bias_interval == pytest.approx(tuple(reference.confidence_interval()))
    assert found.bias == pytest.approx(-2.1, abs=0.05) and found.sd == pytest.approx(38.8, abs=0.05)
    assert (found.lower, found.upper) == pytest.approx((-79.7, 75.5), abs=0.15)
    assert found.bias_interval == pytest.approx((-22.0, 17.8), abs=0.15)
    assert found.lower_interval == pytest.approx((-114.3, -45.1), abs=0.25)
    assert found.upper_interval == pytest.approx((40.9, 110.1), abs=0.25)


def test_exact_intervals_of_limits_hold_them_in_95_of_100():
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        low, high = bland_altman(rng.normal(1, 2, 10), np.zeros(10)).upper_interval
        held += low <= 1 + 1.96 * 2 <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_exact_limits_are_tolerance_factors():
    """One-sided tolerance factor for 95 % of a normal population at 95 % confidence, n = 10: 2.911 in printed tables. By
    other code: the share of 200,000 simulated samples whose mean + 2.911 SD lies above the 95 % point."""
    samples = np.random.default_rng(1).normal(size=(200_000, 10))
    assert (samples.mean(axis=1) + 2.911 * samples.std(axis=1, ddof=1) > 1.644854).mean() == pytest.approx(0.95, abs=0.002)
    d = np.random.default_rng(0).normal(size=10)
    found = bland_altman(d, np.zeros(10), level=0.9, factor=1.644854)
    assert (found.upper_interval[1] - found.bias) / found.sd == pytest.approx(2.911, abs=5e-4)


def test_bland_altman_by_hand():
    """Differences 1, 2, 3, 2, 2, 2 mL: mean 2, variance (1 + 1) / 5, so SD = sqrt(0.4); t of 5 degrees is 2.570582, and
    1.96 SD below and above are the limits. Over means of 10 to 15, 12.5 on average, the slope is
    (-2.5 - 3 - 1.5 + 1 + 3 + 5) / (2 * (6.25 + 2.25 + 0.25)) = 2 / 17.5."""
    d, mean = np.array([1, 2, 3, 2, 2, 2.0]), np.arange(10.0, 16)
    found = bland_altman(mean + d / 2, mean - d / 2)
    half = 2.570582 * math.sqrt(0.4 / 6)
    assert found.bias == 2 and found.sd == pytest.approx(math.sqrt(0.4)) and found.n == 6
    assert found.bias_interval == pytest.approx((2 - half, 2 + half))
    assert (found.lower, found.upper) == pytest.approx((2 - 1.96 * math.sqrt(0.4), 2 + 1.96 * math.sqrt(0.4)))
    assert found.slope == pytest.approx(2 / 17.5)


def test_proportional_bias_is_pitmans_test_of_equal_variances():
    x, y = PEFR
    found = bland_altman(x, y)
    assert found.slope_p == pytest.approx(stats.pearsonr(x - y, x + y).pvalue)
    line = sm.OLS(x - y, sm.add_constant((x + y) / 2)).fit()
    assert (found.slope, found.slope_p) == (pytest.approx(line.params[1]), pytest.approx(line.pvalues[1]))
    assert found.slope_interval == pytest.approx(tuple(line.conf_int()[1]))
    strong = bland_altman(0.7 * x, x)
    assert strong.slope == pytest.approx(-0.3 / 0.85) and strong.slope_p < 1e-6


def test_concordance_by_hand():
    "x = 1 .. 5, y = x + 1: covariance 2, variances 2, shift 1: 4 / (2 + 2 + 1) = 0.8; y = 2 x: 8 / (2 + 8 + 9)."
    x = np.arange(1.0, 6)
    assert concordance(x, x + 1).value == pytest.approx(0.8) and concordance(x, 2 * x).value == pytest.approx(8 / 19)
    assert concordance(x, x).value == pytest.approx(1) and concordance(x, -x + 6).value == pytest.approx(-1)


@pytest.mark.parametrize("shift, value, interval", [(0, 0.9427, (0.8505, 0.9787)), (150, None, None)])
def test_concordance_of_peak_flow(shift, value, interval):
    """Lin's coefficient and its z interval by the formulas of his paper (1989, with the note of 2000), step by step from
    sums: rho_c = r * C_b, where C_b = 2 / (v + 1/v + u^2), and the variance of z is se^2 / (1 - rho_c^2)^2; also with a
    bias of 150 L/min, where the terms of u count."""
    x, y = PEFR[0] + shift, PEFR[1]
    found, r = concordance(x, y), stats.pearsonr(x, y).statistic
    v, u2 = math.sqrt(x.var() / y.var()), (x.mean() - y.mean()) ** 2 / math.sqrt(x.var() * y.var())
    c = r * 2 / (v + 1 / v + u2)
    se = math.sqrt(((1 - r * r) * c * c * (1 - c * c) / r ** 2 + 2 * c ** 3 * (1 - c) * u2 / r
                    - c ** 4 * u2 ** 2 / (2 * r * r)) / 15)
    z, half = 0.5 * math.log((1 + c) / (1 - c)), 1.959964 * se / (1 - c * c)
    ends = [(math.exp(2 * one) - 1) / (math.exp(2 * one) + 1) for one in (z - half, z + half)]
    assert found.value == pytest.approx(c) and found.interval == pytest.approx(tuple(ends))
    assert value is None or (c == pytest.approx(value, abs=5e-5) and ends == pytest.approx(interval, abs=5e-5))


def test_interval_of_concordance_holds_it():
    rng, held, true = np.random.default_rng(0), 0, 2 * 0.8 / (1 + 1 + 0.5 ** 2)
    for _ in range(1000):
        x = rng.normal(size=40)
        low, high = concordance(x, 0.8 * x + 0.6 * rng.normal(size=40) + 0.5).interval
        held += low <= true <= high
    assert 0.92 <= held / 1000 <= 0.975


def test_icc_of_shrout_and_fleiss():
    """Shrout & Fleiss 1979, table 4: ICC(3,1) = .71; R's psych::ICC prints 0.71, F = 11, interval 0.342 to 0.95. By
    other code: mean squares of statsmodels' analysis of variance, 11.24 between targets and 1.02 left."""
    found = icc31(JUDGES)
    assert found.value == pytest.approx(0.71, abs=0.005)
    assert found.interval[0] == pytest.approx(0.342, abs=5e-4) and found.interval[1] == pytest.approx(0.95, abs=5e-3)
    long = pd.DataFrame(JUDGES).rename_axis("target").reset_index().melt("target", var_name="judge")
    squares = sm.stats.anova_lm(smf.ols("value ~ C(target) + C(judge)", long).fit())["mean_sq"]
    between, left = squares["C(target)"], squares["Residual"]
    assert (between, left) == (pytest.approx(11.24, abs=0.005), pytest.approx(1.02, abs=0.005))
    assert found.value == pytest.approx((between - left) / (between + 3 * left))
    assert icc31(JUDGES + np.array([0, 5, -2, 1])).value == pytest.approx(found.value)
    with pytest.raises(ValueError, match="two raters"):
        icc31(JUDGES[:, :1])


# few patients

def test_no_p_value_with_five():
    x, y = np.arange(5.0), np.arange(5.0) ** 2 + 1
    assert equivalence(x, y, 1).p is None and spearman(x, y).p is None and bland_altman(x, y).slope_p is None
    assert page_trend(pd.DataFrame({0: x, 1: y, 2: x + y})).p_rising is None


SCORE = st.one_of(st.just(math.nan), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@pytest.mark.long
@given(st.lists(st.tuples(SCORE, SCORE, SCORE), max_size=12))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("error")
def test_whatever_comes_in_json_comes_out(rows):
    table = pd.DataFrame(rows, columns=["a", "b", "c"], dtype=float)
    for result in (equivalence(table.a, table.b, 0.03), spearman(table.a, table.b), page_trend(table),
                   bland_altman(table.a, table.b), concordance(table.a, table.b), icc31(table.to_numpy().reshape(-1, 3))):
        json.dumps(result.facts(), allow_nan=False)
        assert result._repr_markdown_()
