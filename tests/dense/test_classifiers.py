"""The vote of the nearest by a plain loop, logistic regression by scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from fasthpm.dense import classifiers


def features(count: int, classes: int = 4, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows that depend on their label, with much noise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def slow_vote(bank: Tensor, labels: Tensor, query: Tensor, k: int, classes: int) -> int:
    """One query: sort all cosines, count the classes of the first k."""
    similarity = [float(row @ query / (row.norm() * query.norm())) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes = [sum(int(labels[i]) == label for i in nearest) for label in range(classes)]
    return votes.index(max(votes))


@pytest.mark.parametrize("similarities", [1, 1 << 24])
def test_the_nearest_vote(monkeypatch: pytest.MonkeyPatch, similarities: int) -> None:
    monkeypatch.setattr(classifiers, "SIMILARITIES", similarities)
    bank, labels = features(90)
    queries, _ = features(30, seed=1)
    found = classifiers.nearest_votes(bank.double(), labels, queries.double(), 4)
    assert list(found) == [1, 3, 10, 30]
    for k, predicted in found.items():
        assert predicted.tolist() == [slow_vote(bank.double(), labels, query, k, 4) for query in queries.double()]


def test_a_small_bank_votes_with_as_many_as_it_has() -> None:
    bank, labels = features(5)
    assert list(classifiers.nearest_votes(bank, labels, bank, 4)) == [1, 3]
    assert list(classifiers.nearest_votes(bank, labels, bank, 4, [10])) == [5]
    assert classifiers.nearest_votes(bank, labels, bank, 4, [1])[1].tolist() == labels.tolist()


def test_scaling_is_scikit_learns() -> None:
    rows, _ = features(50)
    rows[:, 2] = 7
    other, _ = features(20, seed=3)
    theirs = StandardScaler().fit(rows.double().numpy())
    np.testing.assert_allclose(classifiers.scaler_of(rows)(other), theirs.transform(other.double().numpy()), atol=1e-5)


@pytest.mark.parametrize("penalty", [1e-3, 1e-1, 10.0])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    rows, labels = features(300)
    theirs = LogisticRegression(C=penalty, tol=1e-10, max_iter=5000).fit(rows.double().numpy(), labels.numpy())
    ours = classifiers.fit_logistic(rows.double(), labels, 4, penalty)
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=1e-2)
    intercepts = ours.bias - ours.bias.mean()  # only their differences matter
    np.testing.assert_allclose(intercepts, theirs.intercept_ - theirs.intercept_.mean(), atol=1e-2)
    other, _ = features(200, seed=5)
    assert (ours(other.double()).numpy() == theirs.predict(other.double().numpy())).mean() > 0.99


def test_where_one_begins_does_not_matter() -> None:
    rows, labels = features(300)
    found = classifiers.fit_all(rows.double(), labels, 4, (1.0, 1e-2))
    assert list(found) == [1e-2, 1.0]
    for penalty, linear in found.items():
        alone = classifiers.fit_logistic(rows.double(), labels, 4, penalty)
        torch.testing.assert_close(linear.weight, alone.weight, atol=2e-3, rtol=0)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        classifiers.fit_logistic(rows, labels, 4, 1.0)
