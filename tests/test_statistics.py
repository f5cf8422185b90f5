"""Statistics against worked examples, brute force and simulation.

Every function has an example whose arithmetic stands in the test, or one that is printed where the test says, and the
printed numbers are recomputed here by other code (scipy, statsmodels, enumeration).
"""
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats import multitest
from statsmodels.stats.power import TTestPower

from sahlora.cohorts import cohort
from sahlora.evaluation.statistics import (BINS, FEW, bca_interval, bin_table, compare, complete, describe, friedman,
                                hodges_lehmann, holm, paired, patient_scores, power, seed_spread,
                                signed_rank_tails, signed_ranks, smallest_difference, strategies, summary_table,
                                too_few)

# Hamilton depression scale before and after tranquilizer: Hollander & Wolfe, Nonparametric Statistical Methods,
# table 3.1, and the example of R's wilcox.test.
DEPRESSION = (np.array([1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]),
              np.array([0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]))
# Times to round first base, 22 players, three ways: Hollander & Wolfe, table 7.1, and the example of R's friedman.test.
ROUNDING = np.array([
    5.40, 5.50, 5.55, 5.85, 5.70, 5.75, 5.20, 5.60, 5.50, 5.55, 5.50, 5.40, 5.90, 5.85, 5.70, 5.45, 5.55,
    5.60, 5.40, 5.40, 5.35, 5.45, 5.50, 5.35, 5.25, 5.15, 5.00, 5.85, 5.80, 5.70, 5.25, 5.20, 5.10, 5.65,
    5.55, 5.45, 5.60, 5.35, 5.45, 5.05, 5.00, 4.95, 5.50, 5.50, 5.40, 5.45, 5.55, 5.50, 5.55, 5.55, 5.35,
    5.45, 5.50, 5.55, 5.50, 5.45, 5.25, 5.65, 5.60, 5.40, 5.70, 5.65, 5.55, 6.30, 6.30, 6.25]).reshape(22, 3)


# one column

def test_summary_by_hand():
    """Of 1 to 10: mean 55/10, variance 10 * 11 / 12, quartiles of R's type 7: 1 + 9/4, 1 + 9/2, 1 + 27/4."""
    found = describe(np.arange(1, 11))
    assert (found.n, found.mean, found.q1, found.median, found.q3) == (10, 5.5, 3.25, 5.5, 7.75)
    assert found.sd == pytest.approx(math.sqrt(110 / 12))


def test_rows_with_a_missing_value_go_together():
    (x, y), dropped = complete([0.5, math.nan, 0.1 + 0.2], [0.4, 0.6, 0.3])
    assert dropped == 1 and x.tolist() == [0.5, 0.3] and y.tolist() == [0.4, 0.3]


@pytest.mark.parametrize("x", [[0.1, 0.2, 0.25, 0.4, 0.9], [0.0, 0.5, 0.55, 0.6, 0.62, 0.7]])
def test_bca_is_that_of_all_resamples(x):
    """Efron's formula on the bootstrap's whole distribution, n to the power of n means, with the jackknife's skewness."""
    x = np.array(x)
    n, z = len(x), stats.norm
    means = x[np.array(list(itertools.product(range(n), repeat=n)))].mean(axis=1).round(12)
    z0 = z.ppf(((means < x.mean() - 1e-9).mean() + (means < x.mean() + 1e-9).mean()) / 2)
    left_out = (x.sum() - x) / (n - 1)
    lean = left_out.mean() - left_out
    a = (lean ** 3).sum() / (6 * (lean ** 2).sum() ** 1.5)
    levels = [z.cdf(z0 + (z0 + z.ppf(q)) / (1 - a * (z0 + z.ppf(q)))) for q in (0.025, 0.975)]
    low, high = bca_interval(x, resamples=200_000)[0]
    assert (means <= low).mean() == pytest.approx(levels[0], abs=0.006)
    assert (means <= high).mean() == pytest.approx(levels[1], abs=0.006)


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


def misses(rng, n):
    "Soft Dice of a cohort in which one patient in seven is missed altogether."
    return np.where(rng.uniform(size=n) < 1 / 7, 0.02 * rng.uniform(size=n), rng.beta(6, 3, n))


SHAPES = {"even": (lambda rng, n: rng.beta(5, 5, n), 1 / 2), "high": (lambda rng, n: rng.beta(6, 2, n), 3 / 4),
          "low": (lambda rng, n: rng.beta(2, 3, n), 2 / 5), "misses": (misses, 0.01 / 7 + 6 / 7 * 2 / 3)}


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(SHAPES))
def test_coverage_of_the_bootstrap_at_thirty(shape):
    "Means of 30 Dice-like scores: the 95 % interval holds the true mean in 91 to 97 % of 2,000 studies."
    draw, mean = SHAPES[shape]
    rng = np.random.default_rng(5)
    intervals = [bca_interval(draw(rng, 30))[0] for _ in range(2000)]
    held = np.mean([low <= mean <= high for low, high in intervals])
    print(f"coverage, {shape}: {held:.4f}")
    assert 0.91 <= held <= 0.97


# the table

def rows_of(scores, method="cp-lora", rank=8, seed=0, **more):
    return pd.DataFrame({"method": method, "rank": rank, "region": "decoding", "seed": seed, "role": "test",
                         "patient": [f"p{i}" for i in range(len(scores))], "dice_soft": scores} | more)


def test_a_patient_is_the_mean_over_seeds_and_seeds_are_apart():
    table = pd.concat([rows_of([0.2, 0.4, np.nan]), rows_of([0.4, 0.8, np.nan], seed=1),
                       rows_of([0.9, 0.9, 0.9]).assign(role="fit")])
    wide = patient_scores(table)
    np.testing.assert_allclose(wide["cp-lora-r8-decoding"], [0.3, 0.6, np.nan])
    spread = seed_spread(table)
    assert list(spread) == ["strategy", "seeds", "sd_seeds", "sd_patients"] and list(spread.seeds) == [2]
    assert spread.sd_seeds[0] == pytest.approx(0.3 / math.sqrt(2)), "seeds' means are 0.3 and 0.6"
    assert spread.sd_patients[0] == pytest.approx(0.3 / math.sqrt(2)), "patients' means are 0.3 and 0.6"
    row = summary_table(table).iloc[0]
    assert (row.n, row.missing, row["mean"], row.seeds) == (2, 1, pytest.approx(0.45), 2)


def test_seeds_and_patients_spread_apart_by_hand():
    """Two seeds whose means are 0.4 and 0.6 over the same two patients, of 0.4 and 0.6 as well over seeds; a patient
    scored under one seed alone would mix both spreads and is left out; one seed has no spread."""
    table = pd.concat([rows_of([0.2, 0.6, 0.9]), rows_of([0.6, 0.6, np.nan], seed=1),
                       rows_of([0.1, 0.5], "none", None, region="")])
    spread = seed_spread(table).set_index("strategy")
    one = spread.loc["cp-lora-r8-decoding"]
    assert (one.sd_seeds, one.sd_patients) == (pytest.approx(0.2 / math.sqrt(2)), pytest.approx(0.2 / math.sqrt(2)))
    alone = spread.loc["none"]
    assert alone.seeds == 1 and math.isnan(alone.sd_seeds) and alone.sd_patients == pytest.approx(0.4 / math.sqrt(2))


def test_strategies_come_from_the_columns_of_a_table():
    table = pd.concat([rows_of([0.1]), rows_of([0.1], "fine-tuning", None),
                       rows_of([0.1], "none", None).assign(region=np.nan)])
    assert [run.name for run in strategies(table)] == ["cp-lora-r8-decoding", "fine-tuning-decoding", "none"]
    few = strategies(table.assign(patients=[5, "", np.nan], network=["unet", "", None]))
    assert [run.name for run in few] == ["unet-cp-lora-r8-decoding-n5", "fine-tuning-decoding", "none"]
    other = strategies(table.assign(extras=[True, False, np.nan], options=['{"alpha": 16.0}', None, np.nan], seed=12))
    assert other.iloc[0].name == "cp-lora-r8-decoding-extras-alpha16" and other.iloc[2].name == "none"


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
    assert BINS == (*cohort.BINS, "unknown")


def test_bins_of_five_have_a_mean_and_no_interval():
    scores = [0.1, 0.2, 0.3, 0.4, 0.5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    table = bin_table(rows_of(scores, volume_bin=["<25"] * 5 + [">100"] * 6)).set_index("volume_bin")
    five, six = table.loc["<25"], table.loc[">100"]
    assert five["mean"] == pytest.approx(0.3) and pd.isna(five.low) and pd.isna(five.high) and "n = 5" in five.note
    assert six["mean"] == pytest.approx(0.35) and six.low < 0.35 < six.high and six.note == ""


# signed ranks

def test_signed_rank_of_depression():
    """R's help of wilcox.test, paired, greater: V = 40, p-value = 0.01953. By hand: the two negative differences have
    ranks 2 and 3, so V = 45 - 5, and 10 of the 512 choices of signs have a sum of 5 or less."""
    x, y = DEPRESSION
    assert signed_ranks(x - y)[x > y].sum() == 40
    assert signed_rank_tails(x - y)[0] == pytest.approx(10 / 512) and 10 / 512 == pytest.approx(0.01953, abs=5e-6)
    reference = stats.wilcoxon(x, y, alternative="greater", method="exact")
    assert (reference.statistic, reference.pvalue) == (40, pytest.approx(10 / 512))
    found = paired(x, y)
    assert found.p == pytest.approx(20 / 512) and found.rank_biserial == pytest.approx((40 - 5) / 45)


def test_difference_of_depression():
    """Hollander & Wolfe, examples 3.3 and 3.4: -0.46, and -0.786 to -0.010 (y - x); its level is 1 - 2 * 10/512. By
    other code: every shift of a fine grid that scipy's exact test does not reject at 5 %."""
    x, y = DEPRESSION
    middle, interval = hodges_lehmann(y - x)
    assert middle == pytest.approx(-0.46) and interval == pytest.approx((-0.786, -0.010))
    shifts = np.arange(-1.0, 0.2, 0.001) + 0.0003  # no ties with a Walsh average
    kept = [one for one in shifts if stats.wilcoxon(y - x - one, method="exact").pvalue > 0.05]
    assert (kept[0], kept[-1]) == (pytest.approx(-0.786, abs=0.002), pytest.approx(-0.010, abs=0.002))
    assert middle == pytest.approx(np.median([(y - x)[[i, j]].mean() for i in range(9) for j in range(i, 9)]))


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
    "R's help of friedman.test: chi-squared = 11.143, df = 2, p-value = 0.003805; Kendall's W is that over n (k - 1)."
    found, reference = friedman(pd.DataFrame(ROUNDING)), stats.friedmanchisquare(*ROUNDING.T)
    assert found.statistic == pytest.approx(11.143, abs=5e-4) and found.p == pytest.approx(0.003805, abs=5e-7)
    assert (found.statistic, found.p) == (pytest.approx(reference.statistic), pytest.approx(reference.pvalue))
    assert found.kendall_w == pytest.approx(11.142857 / (22 * 2))


def test_friedman_by_hand():
    """Eight patients agree on the order of three: rank sums 8, 16, 24, chi-square 12 / (8 * 3 * 4) * (64 + 256 + 576)
    less 3 * 8 * 4, which is 16, and its p value with two degrees of freedom is exp(-8)."""
    found = friedman(pd.DataFrame(np.arange(8.0)[:, None] + [0, 0.1, 0.2]))
    assert (found.statistic, found.p, found.kendall_w) == (pytest.approx(16), pytest.approx(math.exp(-8)), 1)


def test_compare_by_hand():
    "The same eight: b above a and c above a for all, p = 2/256 each, Holm doubles it; with six, 4/64 is too much."
    scores = pd.DataFrame(np.arange(8.0)[:, None] + [0, 0.1, 0.2], columns=["a", "b", "c"])
    found = compare(scores, [("b", "a"), ("c", "a")])
    assert [(one.test.p, one.p_holm, one.significant) for one in found.pairs] == [(2 / 256, 4 / 256, True)] * 2
    table = compare(scores[:6], [("b", "a"), ("c", "a")]).table()
    assert table.p_holm.tolist() == [4 / 64] * 2 and not table.significant.any()
    assert table.difference.tolist() == pytest.approx([0.1, 0.2])


def test_friedman_drops_incomplete_patients_and_knows_when_nothing_differs():
    data = ROUNDING.copy()
    data[3, 1] = np.nan
    found = friedman(pd.DataFrame(data))
    assert found.dropped == 1
    assert found.statistic == pytest.approx(stats.friedmanchisquare(*np.delete(ROUNDING, 3, axis=0).T).statistic)
    assert friedman(pd.DataFrame(np.ones((8, 3)))).p == 1
    assert friedman(pd.DataFrame(ROUNDING[:, :2])).p is None


def test_holm_by_hand():
    "In order: 4 * 0.005 = 0.02, 3 * 0.01 = 0.03, 2 * 0.03 = 0.06, and 0.04 may not fall below 0.06."
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.03]) == [0.04, None, 0.04] and holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_holm_agrees_with_statsmodels():
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
    """Share of studies without an effect in which at least one pre-named comparison (all against two baselines) is
    called significant, after Friedman's gate and Holm: the family-wise error of `compare`."""
    rng, pairs, found = np.random.default_rng(seed), [(i, 0) for i in range(1, k)] + [(i, 1) for i in range(2, k)], 0
    for _ in range(studies):
        noise = rng.standard_t(3, (n, k)) * rng.uniform(0.02, 0.1, (n, 1))
        scores = np.clip(rng.beta(2, 2, (n, 1)) + noise, 0, 1)  # hard patients, heavy tails, and zeros that tie
        found += any(pair.significant for pair in compare(pd.DataFrame(scores), pairs).pairs)
    return found / studies


def test_false_alarms_of_the_comparisons_quickly():
    assert false_alarms(120, seed=0) < 0.10


@pytest.mark.slow
@pytest.mark.parametrize("n, k", [(12, 8), (30, 8), (30, 3), (30, 2)])
def test_false_alarms_of_the_comparisons(n, k):
    share = false_alarms(1000, seed=11, n=n, k=k)
    print(f"false alarms in 1,000 studies of {n} patients and {k} strategies: {share:.3f}")
    assert share < 0.065


def test_an_effect_is_found():
    rng = np.random.default_rng(4)
    scores = pd.DataFrame(rng.beta(3, 3, (30, 1)) + rng.normal(0, 0.04, (30, 5)))
    scores[4] += 0.06
    found = compare(scores, [(i, 0) for i in range(1, 5)])
    assert [pair.significant for pair in found.pairs] == [False, False, False, True]


# power

def test_power_of_the_t_test():
    "R's pwr.t.test(d = 0.5, power = 0.8, type = 'paired'): n = 33.36713; statsmodels says the same."
    assert power(33.36713, 0.5, efficiency=1) == pytest.approx(0.8, abs=1e-6)
    assert TTestPower().solve_power(0.5, power=0.8, alpha=0.05) == pytest.approx(33.36713, abs=1e-4)
    assert power(18, 1.2, sd=2.0, alpha=0.01, efficiency=1) == pytest.approx(TTestPower().power(0.6, 18, 0.01))
    assert power(20, 0.0) == pytest.approx(0.05) and power(30, 0.5) < power(30, 0.5, efficiency=1)


@pytest.mark.long
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

def test_no_p_value_with_five():
    x, y = np.arange(5.0), np.arange(5.0) ** 2 + 1
    assert paired(x, y).p is None and friedman(pd.DataFrame({0: x, 1: y, 2: x + y})).p is None
    assert smallest_difference(FEW) is None and "n = 5" in too_few(5) and too_few(6) == ""
    assert "too few" in paired(x, y).note and not compare(pd.DataFrame({0: x, 1: y}), [(0, 1)]).pairs[0].significant


SCORE = st.one_of(st.just(math.nan), st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


@pytest.mark.long
@given(st.lists(st.tuples(SCORE, SCORE, SCORE), max_size=12))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("error")
def test_whatever_comes_in_json_comes_out(rows):
    table = pd.DataFrame(rows, columns=["a", "b", "c"], dtype=float)
    for result in (describe(table.a), paired(table.a, table.b), friedman(table), compare(table, [("a", "b"), ("c", "b")])):
        json.dumps(result.facts(), allow_nan=False)
        assert result._repr_markdown_()
