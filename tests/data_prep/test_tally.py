"""Statistics of arrays: against sorting and float64, for every type, whatever the pieces."""

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest

from data_prep.tally import PERCENTILES, Tally
from fasthpm.data.values import DTYPES


def samples(dtype: str, count: int = 5) -> list[np.ndarray]:
    """[h, w, 3] of sizes that differ; the third channel is constant, the first full of small and large numbers."""
    rng = np.random.default_rng(0)
    made = []
    for k in range(count):
        shape = (7 + k, 9, 3)
        if dtype.startswith("float"):
            values = (rng.normal(0, 1, shape) * 10.0 ** rng.integers(-3, 4, shape)).astype(dtype)
        else:
            info = np.iinfo(dtype)
            values = rng.integers(info.min, info.max + 1, shape).astype(dtype)
        values[..., 2] = 5
        made.append(values)
    return made


def rank(values: np.ndarray, name: str) -> float:
    """The percentile as sorting finds it."""
    ordered = np.sort(values)
    return float(ordered[max(math.ceil(Fraction(name) / 100 * len(ordered)), 1) - 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("marked", [False, True])
def test_statistics_are_those_of_all_values(dtype: str, marked: bool) -> None:
    made = samples(dtype)
    nodata = None
    if marked:
        nodata = math.nan if dtype == "float32" else 5.0
        for values in made:
            values[:3, :4, 0] = nodata
    tally = Tally(dtype, 3, nodata)
    for values in made:
        tally.add(values)
    found, unit = tally.statistics(), 255 if dtype == "uint8" else 1
    for channel in range(3):
        every = np.concatenate([values[..., channel].ravel() for values in made])
        out = np.isnan(every) if nodata is not None and math.isnan(nodata) else every == nodata
        kept = every[~out].astype(np.float64)
        assert found["missing"][channel] == int(out.sum())
        if not len(kept):
            assert (found["mean"][channel], found["std"][channel]) == (0, 0)
            continue
        assert found["mean"][channel] == pytest.approx(kept.mean() / unit, rel=1e-12)
        assert found["std"][channel] == pytest.approx(kept.std() / unit, rel=1e-9, abs=1e-12)
        assert (found["min"][channel], found["max"][channel]) == (kept.min(), kept.max())
        for name in PERCENTILES:
            near = 1e-3 if dtype == "float32" else 0
            assert found["percentiles"][name][channel] == pytest.approx(rank(kept, name), rel=near, abs=0)
    assert found["pixels"] == sum(values.shape[0] * values.shape[1] for values in made)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_pieces_make_no_difference(dtype: str) -> None:
    made = samples(dtype)

    def joined(cuts: list[int]) -> dict:
        whole = Tally(dtype, 3, None)
        for piece in np.split(np.arange(len(made)), cuts):
            one = Tally(dtype, 3, None)
            for k in piece:
                one.add(made[k])
            whole.merge(pickle.loads(pickle.dumps(one)))
        return whole.statistics()

    assert joined([]) == joined([1, 2, 3, 4]) == joined([3])


def test_float_sums_do_not_cancel() -> None:
    values = np.float32(1e6) + np.random.default_rng(0).integers(0, 4, (50, 50, 1)).astype(np.float32) / 16
    tally = Tally("float32", 1, None)
    tally.add(values)
    assert tally.statistics()["std"][0] == pytest.approx(values.astype(np.float64).std(), rel=1e-9)
    other = Tally("float32", 1, None)
    other.combine(tally)
    assert other.statistics() == tally.statistics()
