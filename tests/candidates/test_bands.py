"""Bands of neighbours: disjoint, exactly as many as asked, never the wrong side."""

import pytest

from bixse.candidates.bands import Bands, bands_of, triplet_sources

NODES = [f"d{number:03}" for number in range(300)]
NEIGHBOURS = NODES[1:201]
BANDS = Bands(positive=(10, 20), hard=(150, 160))


def test_each_band_gives_its_count_and_the_sides_never_mix() -> None:
    seen: set[tuple[str, ...]] = set()
    for seed in range(50):
        drawn = triplet_sources("d000", NEIGHBOURS, NODES, BANDS, seed=seed)
        assert (len(drawn.positives), len(drawn.hard), len(drawn.easy)) == (5, 2, 3)
        assert set(drawn.positives) <= set(NEIGHBOURS[10:20])
        assert set(drawn.hard) <= set(NEIGHBOURS[150:160])
        assert not set(drawn.easy) & {"d000", *NEIGHBOURS[:160]}
        assert len({*drawn.positives, *drawn.hard, *drawn.easy}) == 10
        seen.add(drawn.positives)
    assert len(seen) > 10
    again = triplet_sources("d000", NEIGHBOURS, NODES, BANDS, seed=49)
    assert again == drawn


def test_bands_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="must not overlap"):
        Bands(positive=(10, 20), hard=(15, 30))
    with pytest.raises(ValueError, match=r"positive band \[5, 5\) holds no rank"):
        Bands(positive=(5, 5), hard=(15, 30))
    with pytest.raises(ValueError, match="'d000' has 100 neighbours, the bands reach to 160"):
        triplet_sources("d000", NEIGHBOURS[:100], NODES, BANDS)
    with pytest.raises(ValueError, match="hard band holds 10 documents, 11 are asked"):
        triplet_sources("d000", NEIGHBOURS, NODES, BANDS, hard=11)
    with pytest.raises(ValueError, match="easy band holds 0 documents, 3 are asked"):
        triplet_sources("d000", NEIGHBOURS, NODES[:161], BANDS)


def test_fractions_scale_with_the_corpus() -> None:
    assert bands_of(20_000, (0.001, 0.00125), (0.1999, 0.2)) == Bands((20, 25), (3998, 4000))
    small = bands_of(100, (0.001, 0.00125), (0.1999, 0.2))
    assert small == Bands((0, 1), (19, 20))
