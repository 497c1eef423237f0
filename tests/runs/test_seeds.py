"""What a stage changes whatever its seed."""

import numpy as np
import scipy.stats

from ministral_jax.runs.seeds import Change
from ministral_jax.stages import figures

REWARD, LOOPS = figures()["reward"], figures()["loop_rate"]


def test_intervals_are_those_of_students_t():
    rng = np.random.default_rng(0)
    for n in (2, 3, 8):
        before, after = rng.random((2, n))
        change = Change(REWARD, list(zip(before.tolist(), after.tolist(), strict=True)))
        low, high = scipy.stats.ttest_rel(after, before).confidence_interval(0.95)
        assert change.half is not None
        np.testing.assert_allclose([change.mean - change.half, change.mean + change.half], [low, high], rtol=1e-9)
        assert change.verdict == ("within seed noise" if low < 0 < high else "better" if low > 0 else "worse")


def test_verdicts():
    rising, wide = [(0.1, 0.5), (0.1, 0.52), (0.1, 0.48)], [(0.1, 0.3), (0.1, 0.6), (0.1, 0.1)]
    falling = [(b, a) for a, b in rising]
    assert Change(REWARD, rising).verdict == Change(LOOPS, falling).verdict == "better"
    assert Change(REWARD, falling).verdict == Change(LOOPS, rising).verdict == "worse"
    assert Change(REWARD, wide).verdict == "within seed noise"
    assert Change(REWARD, rising[:1]).verdict == "one seed" and Change(REWARD, [(0, 0)] * 3).verdict == "no change"
