"""RankMe: how many directions features use."""

import pytest
import torch

from fasthpm.run.feature_rank import rank_me


def test_orthogonal_features_use_all_directions_and_equal_ones_one() -> None:
    assert float(rank_me(torch.eye(6))) == pytest.approx(6, rel=1e-5)
    assert float(rank_me(torch.ones(6, 4))) == pytest.approx(1, abs=1e-3)
    two = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert float(rank_me(two)) == pytest.approx(2, rel=1e-5)
