"""BiXSE's claim where relevance is known: graded BCE against InfoNCE, paired over seeds.

Methods 1.7: at least .03 nDCG@10 over thresholded InfoNCE, more under noise, never more than .01
below the weighted form.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from benchmarks.graded_toy import Options, graded_ndcg, lead, make, replaced, scores
from bixse.evaluation.metrics import ndcg
from bixse.records import Hit

FAIR = ("threshold", "weighted", "graded_bce")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_judged_documents_are_of_mixed_grades() -> None:
    world = make(Options(), seed=0)
    thirds = np.digitize(world.relevance_Q, (0.05, 0.5))
    shares = np.bincount(thirds, minlength=3) / len(thirds)
    assert shares == pytest.approx([1 / 3] * 3, abs=0.04)
    assert len(world.relevance_Q) == 2400
    # Many documents of a query are partly relevant, and few are relevant.
    assert ((world.test_relevance_QD > 0.05).mean(axis=1) > 0.1).mean() > 0.95
    assert (world.test_relevance_QD >= 0.5).mean() < 0.05


def test_noise_replaces_its_share_and_more_keeps_what_less_has_replaced() -> None:
    clean = np.full(2400, 2.0)
    some, more = (replaced(clean, share, seed=0) for share in (0.2, 0.4))
    assert (some != clean).mean() == pytest.approx(0.2, abs=0.03)
    assert (more != clean).mean() == pytest.approx(0.4, abs=0.03)
    assert (some[some != clean] == more[some != clean]).all()
    assert (more[more != clean] <= 1).all()


def test_its_measure_is_ours() -> None:
    draw = np.random.default_rng(0)
    score_QD, gain_QD = draw.normal(size=(5, 40)), draw.random((5, 40)).clip(0.5, 1) - 0.5
    gain_QD[4] = 0
    found = graded_ndcg(score_QD, gain_QD, 10)
    for row in range(5):
        hits = [Hit(str(d), 0.0, rank) for rank, d in enumerate(np.argsort(-score_QD[row]), 1)]
        gains = {str(d): float(gain) for d, gain in enumerate(gain_QD[row])}
        assert found[row] == pytest.approx(ndcg(hits, gains, 10), abs=1e-12)


def test_graded_bce_leads_under_noise() -> None:
    found = scores(Options(seeds=3, noise=(0.4,)), FAIR)
    over, _, seeds = lead(found, "threshold", 0.4)
    assert seeds == 3
    assert over >= 0.03
    assert lead(found, "weighted", 0.4)[0] > -0.01
    # It learns: a ranking by chance has less than .2.
    assert found["graded_bce", 0.4].min() > 0.5


@pytest.mark.slow
def test_the_margins_of_the_published_toy() -> None:
    found = scores(Options(seeds=5), FAIR)
    leads = {noise: lead(found, "threshold", noise) for noise in (0.0, 0.2, 0.4)}
    assert all(seeds == 5 and mean >= 0.03 for mean, _, seeds in leads.values()), leads
    assert min(leads[0.2][0], leads[0.4][0]) > leads[0.0][0] + 0.01, leads
    weighted = {noise: lead(found, "weighted", noise)[0] for noise in leads}
    assert min(weighted.values()) > -0.01, weighted
