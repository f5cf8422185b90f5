"""Statistics against published worked examples, hand computation, brute force and simulation."""
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sahlora.statistics import (FEW, bca_interval, bin_table, bland_altman, compare, complete, concordance, describe,
                                equivalence, friedman, hodges_lehmann, holm, icc31, page_trend, paired, patient_scores,
                                power, seed_spread, signed_rank_tails, signed_ranks, smallest_difference, spearman,
                                stars, strategies, summary_table)

# Hamilton depression scale before and after tranquilizer: Hollander & Wolfe, Nonparametric Statistical Methods,
# table 3.1, and the example of R's wilcox.test.
DEPRESSION = (np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]),
              np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]))
# Peak expiratory flow, first readings, large and mini meter, L/min: Bland & Altman 1986, Lancet 327:307.
PEFR = (np.array([494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427.0]),
        np.array([512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451.0]))
# Four judges rate six targets: Shrout & Fleiss 1979, Psychol. Bull. 86:420, table 2.
JUDGES = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
# Times to round first base, 22 players, three ways: Hollander & Wolfe, table 7.1, and the example of R's friedman.test.
ROUNDING = np.array([
    5.40, 5.50, 5.55, 5.85, 5.70, 5.75, 5.20, 5.60, 5.50, 5.55, 5.50, 5.40, 5.90, 5.85, 5.70, 5.45, 5.55,
    5.60, 5.40, 5.40, 5.35, 5.45, 5.50, 5.35, 5.25, 5.15, 5.00, 5.85, 5.80, 5.70, 5.25, 5.20, 5.10, 5.65,
    5.55, 5.45, 5.60, 5.35, 5.45, 5.05, 5.00, 4.95, 5.50, 5.50, 5.40, 5.45, 5.55, 5.50, 5.55, 5.55, 5.35,
    5.45, 5.50, 5.55, 5.50, 5.45, 5.25, 5.65, 5.60, 5.40, 5.70, 5.65, 5.55, 6.30, 6.30, 6.25]).reshape(22, 3)
# Lightness and quality of canned tuna: Hollander & Wolfe, table 8.1, and the example of R's cor.test.
TUNA = ([44.4, 45.9, 41.9, 53.3, 44.7, 44.1, 50.7, 45.2, 60.1], [2.6, 3.1, 2.5, 5.0, 3.6, 4.0, 5.2, 2.8, 3.8])
# Strength of cotton in three blocks at 144, 108, 72, 54, 36 lb of potash: Hollander & Wolfe, example 7.2 (R: NSM3).
COTTON = np.array([[7.46, 7.17, 7.76, 8.14, 7.63], [7.68, 7.57, 7.73, 8.15, 8.00], [7.21, 7.80, 7.74, 7.87, 7.93]])


# one column

def test_quartiles_are_those_of_r():
    "R: quantile(1:10) is 1, 3.25, 5.5, 7.75, 10; sd(1:10) is 3.02765."
    found = describe(np.arange(1, 11))
    assert (found.q1, found.median, found.q3) == (3.25, 5.5, 7.75) and found.sd == pytest.approx(3.02765, abs=1e-5)


def test_bootstrap_follows_shift_and_scale_and_not_the_order():
    x = np.random.default_rng(0).beta(2, 5, 20)
    (low, high), _ = bca_interval(x)
    assert bca_interval(x[::-1]) == bca_interval(x)
    np.testing.assert_allclose(bca_interval(10 * x + 3)[0], (10 * low + 3, 10 * high + 3))
    assert bca_interval(x, seed=1)[0] != (low, high) and bca_interval(x, level=0.9)[0][0] > low


def test_bca_leans_to_the_longer_tail_and_percentiles_less():
    x = np.random.default_rng(3).lognormal(0, 1, 30)
    (low, high), _ = bca_interval(x)
    means = np.random.default_rng(0).choice(x, (9999, 30)).mean(axis=1)
    plain = np.quantile(means, (0.025, 0.975))
    assert low > plain[0] and high > plain[1] and high - x.mean() > x.mean() - low


@pytest.mark.parametrize("x, note", [([], "n = 0"), ([0.5, 0.6], "n = 2"), ([0.4] * 8, "the same"),
                                     ([0.1 + 0.2, 0.3, 0.3], "the same")])
def test_degenerate_columns_have_no_interval_and_say_so(x, note):
    found = describe(x)
    assert found.interval is None and note in found.note and found.n == len(x)


@pytest.mark.slow
def test_coverage_of_the_bootstrap_at_thirty():
    "Means of 30 Dice-like scores: the 95 % interval holds the true mean in 91 to 97 % of studies."
    rng, studies = np.random.default_rng(5), 2000
    for a, b in ((5, 5), (6, 2), (2, 3)):
        held = 0
        for _ in range(studies):
            low, high = bca_interval(rng.beta(a, b, 30), resamples=1999)[0]
            held += low <= a / (a + b) <= high
        print(f"coverage for beta({a}, {b}): {held / studies:.3f}")
        assert 0.91 <= held / studies <= 0.97


# the table

def rows_of(scores, method="cp-lora", rank=8, seed=0, **more):
    return pd.DataFrame({"method": method, "rank": rank, "region": "decoding", "seed": seed, "role": "test",
                         "patient": [f"p{i}" for i in range(len(scores))], "dice_soft": scores, **more})


def test_a_patient_is_the_mean_over_seeds_and_seeds_are_apart():
    table = pd.concat([rows_of([0.2, 0.4, np.nan]), rows_of([0.4, 0.8, np.nan], seed=1),
                       rows_of([0.9, 0.9, 0.9]).assign(role="fit")])
    wide = patient_scores(table)
    np.testing.assert_allclose(wide["cp-lora-r8-decoding"], [0.3, 0.6, np.nan])
    spread = seed_spread(table).loc["cp-lora-r8-decoding"]
    assert spread.seeds == 2
    assert spread.sd_of_seeds == pytest.approx(np.std([0.3, 0.6], ddof=1))
    assert spread.sd_within_patient == pytest.approx((np.std([0.2, 0.4], ddof=1) + np.std([0.4, 0.8], ddof=1)) / 2)
    row = summary_table(table).iloc[0]
    assert (row.n, row.missing, row["mean"], row.seeds) == (2, 1, pytest.approx(0.45), 2)


def test_strategies_come_from_the_run_or_from_its_parts():
    table = pd.concat([rows_of([0.1]), rows_of([0.1], "fine-tuning", None),
                       rows_of([0.1], "none", None).assign(region=np.nan)])
    assert strategies(table).tolist() == ["cp-lora-r8-decoding", "fine-tuning-decoding", "none"]
    assert set(strategies(table.assign(run="cp-lora-r8-decoding-extras-s12"))) == {"cp-lora-r8-decoding-extras"}


def test_a_patient_scored_twice_and_lacking_columns_are_refused():
    with pytest.raises(ValueError, match="cp-lora-r8-decoding, seed 0: patient p0 is there twice"):
        patient_scores(pd.concat([rows_of([0.1]), rows_of([0.2])]))
    with pytest.raises(ValueError, match="no column seed"):
        patient_scores(rows_of([0.1]).drop(columns="seed"))
    with pytest.raises(ValueError, match="differ in length"):
        complete([1, 2], [1])
    with pytest.raises(ValueError, match="infinite"):
        complete([1, math.inf])


def test_every_bin_has_a_row():
    table = bin_table(rows_of([0.1, 0.2, 0.3], volume_bin=["<25", "<25", ">100"]))
    assert dict(zip(table.volume_bin, table.n)) == {"0": 0, "<25": 2, "25-50": 0, "50-100": 0, ">100": 1, "unknown": 0}
    with pytest.raises(ValueError, match="25 to 50"):
        bin_table(rows_of([0.1], volume_bin="25 to 50"))


# signed ranks

def test_signed_rank_of_depression():
    "R: wilcox.test(x, y, paired = TRUE, alternative = 'greater'): V = 40, p = 0.01953; pseudomedian 0.46."
    x, y = DEPRESSION
    assert signed_ranks(x - y)[x > y].sum() == 40
    assert signed_rank_tails(x - y)[0] == pytest.approx(0.01953, abs=5e-6)
    found = paired(x, y)
    assert found.p == pytest.approx(0.03906, abs=5e-6) and found.rank_biserial == pytest.approx((40 - 5) / 45)
    # Hollander & Wolfe, examples 3.3 and 3.4: estimate -0.46, and (-0.786, -0.010) at 96.1 % (y - x)
    assert found.difference == pytest.approx(0.46) and found.interval == pytest.approx((0.010, 0.786))


def by_enumeration(d):
    ranks = np.abs(signed_ranks(d))
    ranks, w = ranks[ranks > 0], signed_ranks(d)[signed_ranks(d) > 0].sum()
    sums = np.array([sum(choice) for choice in itertools.product(*((0, rank) for rank in ranks))])
    return (sums >= w - 1e-9).mean(), (sums <= w + 1e-9).mean()


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=11))
@settings(max_examples=80, deadline=None)
def test_null_distribution_is_every_choice_of_signs_with_ties_and_zeros(d):
    d = np.array(d, dtype=float)
    np.testing.assert_allclose(signed_rank_tails(d), by_enumeration(d))


def test_pratt_by_hand():
    "|d| = 0, 1, 2, 3 has ranks 1 to 4; the zero's rank 1 is left out. W+ = 2 + 4 of 9: 3 of 8 choices are as large."
    d = np.array([0, 1, -2, 3.0])
    assert signed_ranks(d).tolist() == [0, 2, -3, 4] and signed_rank_tails(d) == (3 / 8, 6 / 8)


def test_differences_of_rounding_are_ties():
    assert 0.1 + 0.2 != 0.3 and signed_ranks(np.array([0.1 + 0.2, -0.3, 0.5])).tolist() == [1.5, -1.5, 3]
    assert paired([0.1 + 0.2, 0.5], [0.3, 0.4]).zeros == 1


def test_signed_rank_agrees_with_scipy():
    rng = np.random.default_rng(0)
    d = rng.normal(0.2, 1, 40)
    assert paired(d, 0 * d).p == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)
    d = np.round(rng.normal(0.3, 1, 10), 1)
    d[:2] = 0
    every = stats.wilcoxon(d, zero_method="pratt", method=stats.PermutationMethod())
    assert paired(d, 0 * d).p == pytest.approx(every.pvalue)
    d = rng.normal(0.05, 1, 300)
    assert paired(d, 0 * d).p == pytest.approx(stats.wilcoxon(d, method="asymptotic").pvalue)


def test_large_samples_join_on_to_the_exact_ones():
    d = np.random.default_rng(1).normal(0.1, 1, 201)
    normal = stats.wilcoxon(d[:200], alternative="greater", method="asymptotic").pvalue
    assert signed_rank_tails(d[:200])[0] == pytest.approx(normal, rel=0.02)
    np.testing.assert_allclose(hodges_lehmann(d)[1], hodges_lehmann(d[:200])[1], atol=0.02)


@pytest.mark.parametrize("n, k, coverage", [(6, 1, 0.96875), (9, 6, 0.9609), (10, 9, 0.9512), (30, 138, 0.9502)])
def test_interval_takes_the_walsh_averages_of_the_tables(n, k, coverage):
    "R: qsignrank(0.025, n) is 1, 6, 9, 138; the interval holds 1 - 2 psignrank(k - 1, n)."
    d = np.random.default_rng(n).normal(size=n)
    walsh = np.sort([(d[i] + d[j]) / 2 for i in range(n) for j in range(i, n)])
    assert hodges_lehmann(d)[1] == pytest.approx((walsh[k - 1], walsh[-k]), abs=1e-11)
    exact = np.array([1.0])
    for rank in range(1, n + 1):
        exact = (np.pad(exact, (0, rank)) + np.pad(exact, (rank, 0))) / 2
    assert 1 - 2 * exact[:k].sum() == pytest.approx(coverage, abs=1e-4) and coverage >= 0.95


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=25), st.floats(-2, 2))
@settings(max_examples=60, deadline=None)
def test_difference_shifts_flips_and_lies_within_its_interval(d, shift):
    d = np.round(d, 6)
    middle, (low, high) = hodges_lehmann(d)
    assert low <= middle <= high
    np.testing.assert_allclose(hodges_lehmann(d + shift)[0], middle + shift, atol=1e-9)
    np.testing.assert_allclose(hodges_lehmann(-d)[1], (-high, -low), atol=1e-12)


def test_missing_and_equal_patients():
    found = paired([0.5, np.nan, 0.7, 0.2, 0.3, 0.4, 0.5, 0.9], [0.4, 0.5, 0.7, np.nan, 0.1, 0.1, 0.1, 0.1])
    assert (found.n, found.dropped, found.zeros) == (6, 2, 1) and found.p is not None
    same = paired([0.1] * 8, [0.1] * 8)
    assert (same.difference, same.p, same.interval, same.note) == (0, 1, None, "no patient differs")


# several tests

def test_friedman_of_rounding_first_base():
    "R: friedman.test(RoundingTimes): chi-squared = 11.143, df = 2, p-value = 0.003805."
    found = friedman(pd.DataFrame(ROUNDING))
    assert found.statistic == pytest.approx(11.143, abs=5e-4) and found.p == pytest.approx(0.003805, abs=5e-7)
    assert found.kendall_w == pytest.approx(11.142857 / (22 * 2))


def test_friedman_drops_incomplete_patients_and_knows_when_nothing_differs():
    data = ROUNDING.copy()
    data[3, 1] = np.nan
    found = friedman(pd.DataFrame(data))
    assert found.dropped == 1
    assert found.statistic == pytest.approx(stats.friedmanchisquare(*np.delete(ROUNDING, 3, axis=0).T).statistic)
    assert friedman(pd.DataFrame(np.ones((8, 3)))).p == 1
    assert friedman(pd.DataFrame(ROUNDING[:, :2])).p is None


def test_holm_by_hand():
    "R: p.adjust(c(0.01, 0.04, 0.03, 0.005), 'holm') is 0.03 0.06 0.06 0.02."
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.03]) == [0.04, None, 0.04] and holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_holm_agrees_with_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).uniform(0, 0.2, 12)
    np.testing.assert_allclose(holm(p), multitest.multipletests(p, method="holm")[1])


def test_a_closed_gate_lets_nothing_through():
    rng = np.random.default_rng(0)
    scores = pd.DataFrame(rng.normal(size=(12, 5)))
    scores[5] = scores[0] + np.abs(rng.normal(size=12)) * 0.01  # always above, by very little
    found = compare(scores, [(5, 0), (1, 0), (2, 0), (3, 0), (4, 0)])
    assert found.pairs[0].p_holm < 0.05 < found.omnibus.p and not found.pairs[0].significant
    assert compare(scores, [(5, 0)]).pairs[0].significant, "two strategies need no gate"
    with pytest.raises(ValueError, match="no scores of 9"):
        compare(scores, [(9, 0)])


def false_alarms(studies, seed, n=30, k=8):
    "Share of studies without an effect in which a pre-named comparison comes out: all against two baselines."
    rng, pairs, found = np.random.default_rng(seed), [(i, 0) for i in range(1, k)] + [(i, 1) for i in range(2, k)], 0
    for _ in range(studies):
        noise = rng.standard_t(3, (n, k)) * rng.uniform(0.02, 0.1, (n, 1))
        scores = np.clip(rng.beta(2, 2, (n, 1)) + noise, 0, 1)  # hard patients, heavy tails, and zeros that tie
        found += any(pair.significant for pair in compare(pd.DataFrame(scores), pairs).pairs)
    return found / studies


def test_false_alarms_of_the_whole_procedure_quickly():
    assert false_alarms(120, seed=0) < 0.10


@pytest.mark.slow
@pytest.mark.parametrize("n", [12, 30])
def test_false_alarms_of_the_whole_procedure(n):
    share = false_alarms(1000, seed=11, n=n)
    print(f"false alarms in 1,000 studies of {n} patients: {share:.3f}")
    assert share < 0.065


def test_an_effect_is_found():
    rng = np.random.default_rng(4)
    scores = pd.DataFrame(rng.beta(3, 3, (30, 1)) + rng.normal(0, 0.04, (30, 5)))
    scores[4] += 0.06
    found = compare(scores, [(i, 0) for i in range(1, 5)])
    assert [pair.significant for pair in found.pairs] == [False, False, False, True]


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
    "R: cor.test(x, y, method = 'spearman'): S = 48, p-value = 0.0968, rho = 0.6."
    found = spearman(*TUNA)
    assert found.rho == pytest.approx(0.6) and found.p == pytest.approx(0.0968, abs=5e-5)
    half = 1.959964 * math.sqrt((1 + 0.36 / 2) / 6)  # Bonett & Wright 2000, by hand
    assert found.interval == pytest.approx((math.tanh(math.atanh(0.6) - half), math.tanh(math.atanh(0.6) + half)))


def test_spearman_at_its_ends():
    x = np.arange(8.0)
    assert spearman(x, x ** 3).p == pytest.approx(2 / math.factorial(8)) and spearman(x, x).interval is None
    assert spearman(x, 0 * x).note == "one column is constant" and spearman(x[:5], x[:5]).p is None
    y = np.random.default_rng(0).normal(size=40)
    assert spearman(np.arange(40), y).p == pytest.approx(stats.spearmanr(np.arange(40), y).pvalue)


def test_page_of_cotton():
    "Hollander & Wolfe, example 7.2: strength rises as potash falls, L = 158; P(L >= 155) = 0.0097 for 3 blocks of 5."
    found = page_trend(pd.DataFrame(COTTON))
    assert found.statistic == 158 and found.n == 3 and found.p_rising is None
    orders = itertools.permutations(range(1, 6))
    one = np.bincount([sum((i + 1) * rank for i, rank in enumerate(order)) for order in orders])
    null = np.convolve(np.convolve(one, one), one) / 120 ** 3
    assert null[155:].sum() == pytest.approx(0.0097, abs=5e-5)
    assert stats.page_trend_test(COTTON, method="exact").pvalue == pytest.approx(null[158:].sum())
    doubled = page_trend(pd.DataFrame(np.vstack([COTTON, COTTON])))
    assert doubled.statistic == 316 and doubled.p_rising < 0.001 and doubled.p_falling > 0.99


def test_page_mean_correlation_is_that_of_patients():
    data = np.random.default_rng(0).normal(size=(9, 4))
    found = page_trend(pd.DataFrame(data))
    assert found.mean_rho == pytest.approx(np.mean([stats.spearmanr(range(4), row).statistic for row in data]))
    assert page_trend(pd.DataFrame(data[:, ::-1])).p_rising == pytest.approx(found.p_falling)


# agreement

def test_bland_and_altman_of_peak_flow():
    """Bland & Altman 1986: mean difference -2.1, SD 38.8, limits -79.7 and 75.5; intervals of the bias -22.0 to 17.8,
    of the limits -114.3 to -45.1 and 40.9 to 110.1 L/min (they use 2 SD and se = sqrt(3 s^2 / n))."""
    found = bland_altman(*PEFR, factor=2, exact=False)
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
    "One-sided tolerance factor for 95 % of a normal population at 95 % confidence, n = 10 (ISO 16269-6): 2.911."
    d = np.random.default_rng(0).normal(size=10)
    found = bland_altman(d, np.zeros(10), level=0.9, factor=1.644854)
    assert (found.upper_interval[1] - found.bias) / found.sd == pytest.approx(2.911, abs=5e-4)


def test_proportional_bias_is_pitmans_test_of_equal_variances():
    x, y = PEFR
    found = bland_altman(x, y)
    reference = stats.pearsonr(x - y, x + y)
    assert found.slope_p == pytest.approx(reference.pvalue)
    assert found.slope == pytest.approx(np.polyfit((x + y) / 2, x - y, 1)[0])
    strong = bland_altman(0.7 * x, x)
    assert strong.slope == pytest.approx(-0.3 / 0.85) and strong.slope_p < 1e-6


def test_concordance_by_hand():
    "x = 1 .. 5, y = x + 1: covariance 2, variances 2, shift 1: 4 / (2 + 2 + 1) = 0.8; y = 2 x: 8 / (2 + 8 + 9)."
    x = np.arange(1.0, 6)
    assert concordance(x, x + 1).value == pytest.approx(0.8) and concordance(x, 2 * x).value == pytest.approx(8 / 19)
    assert concordance(x, x).value == pytest.approx(1) and concordance(x, -x + 6).value == pytest.approx(-1)


def test_concordance_of_peak_flow():
    "The concordance of these readings is 0.943; se 0.029 by Lin's formula, checked by hand from r, u and n = 17."
    found = concordance(*PEFR)
    assert found.value == pytest.approx(0.943, abs=5e-4)
    x, y = PEFR
    r, c, u2 = np.corrcoef(x, y)[0, 1], found.value, (x.mean() - y.mean()) ** 2 / (x.std() * y.std())
    se = math.sqrt(((1 - r * r) * c * c * (1 - c * c) / r ** 2 + 2 * c ** 3 * (1 - c) * u2 / r
                    - c ** 4 * u2 ** 2 / (2 * r * r)) / 15)
    assert se == pytest.approx(0.029, abs=5e-4)
    half = 1.959964 * se / (1 - c * c)
    assert found.interval == pytest.approx((math.tanh(math.atanh(c) - half), math.tanh(math.atanh(c) + half)))


def test_interval_of_concordance_holds_it():
    rng, held, true = np.random.default_rng(0), 0, 2 * 0.8 / (1 + 1 + 0.5 ** 2)
    for _ in range(1000):
        x = rng.normal(size=40)
        low, high = concordance(x, 0.8 * x + 0.6 * rng.normal(size=40) + 0.5).interval
        held += low <= true <= high
    assert 0.92 <= held / 1000 <= 0.975


def test_icc_of_shrout_and_fleiss():
    "Shrout & Fleiss 1979, table 4: ICC(3,1) = .71. R's psych::ICC: F = 11, interval 0.34 to 0.95."
    found = icc31(JUDGES)
    assert found.value == pytest.approx(0.71, abs=0.005) and found.interval == pytest.approx((0.342, 0.946), abs=5e-4)
    assert icc31(JUDGES + np.array([0, 5, -2, 1])).value == pytest.approx(found.value)
    with pytest.raises(ValueError, match="two raters"):
        icc31(JUDGES[:, :1])


# power

def test_power_of_the_t_test():
    "R: power.t.test(delta = 0.5, sd = 1, power = 0.8, type = 'paired'): n = 33.36713."
    assert power(33.36713, 0.5, efficiency=1) == pytest.approx(0.8, abs=1e-6)
    assert power(20, 0.0) == pytest.approx(0.05) and power(30, 0.5) < power(30, 0.5, efficiency=1)


@pytest.mark.parametrize("n", [12, 30])
def test_smallest_difference_is_what_signed_rank_tests_show(n):
    rng, difference = np.random.default_rng(0), smallest_difference(n, sd=2.0)
    shown = np.mean([paired(rng.normal(difference, 2, n), np.zeros(n)).p < 0.05 for _ in range(1500)])
    assert 0.765 <= shown <= 0.835


@pytest.mark.parametrize("n", [6, 7, 30, 300])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_smallest_difference_has_the_power_asked_for(n, alpha):
    assert power(n, smallest_difference(n, alpha=alpha), alpha=alpha) == pytest.approx(0.8)
    assert smallest_difference(n, 3.0, alpha=alpha) == pytest.approx(3 * smallest_difference(n, alpha=alpha))


# few patients

def test_no_p_value_and_no_star_with_five():
    x, y = np.arange(5.0), np.arange(5.0) ** 2 + 1
    assert paired(x, y).p is None and equivalence(x, y, 1).p is None and spearman(x, y).p is None
    assert bland_altman(x, y).slope_p is None and friedman(pd.DataFrame({0: x, 1: y, 2: x + y})).p is None
    assert page_trend(pd.DataFrame({0: x, 1: y, 2: x + y})).p_rising is None and smallest_difference(FEW) is None
    assert stars(1e-6, 5) == ""
    assert [stars(p, 6) for p in (0.05, 0.04, 0.004, 0.0004, None)] == ["", "*", "**", "***", ""]
    assert "too few" in paired(x, y).note and not compare(pd.DataFrame({0: x, 1: y}), [(0, 1)]).pairs[0].significant


SCORE = st.one_of(st.just(math.nan), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@given(st.lists(st.tuples(SCORE, SCORE, SCORE), max_size=12))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("error")
def test_whatever_comes_in_json_comes_out(rows):
    table = pd.DataFrame(rows, columns=["a", "b", "c"], dtype=float)
    results = [describe(table.a), paired(table.a, table.b), friedman(table), compare(table, [("a", "b"), ("c", "b")]),
               equivalence(table.a, table.b, 0.03), spearman(table.a, table.b), page_trend(table),
               bland_altman(table.a, table.b), concordance(table.a, table.b), icc31(table.to_numpy().reshape(-1, 3))]
    for result in results:
        json.dumps(result.facts(), allow_nan=False)
        assert result._repr_markdown_()
