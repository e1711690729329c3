"""The k-NN probe: DINO's vote against plain loops, ranks that hold different shares of the data, and the command."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fasthpm import recipes
from fasthpm.checkpoint.weights import checkpoint_of, load_weights
from fasthpm.data import build_loader
from fasthpm.errors import UserError
from fasthpm.patches import model_of
from fasthpm.probes import features, knn
from tests.helpers.data_fixtures import prepare
from tests.helpers.finetuning import DATA, flat_folder, read, refused, start


def slow_vote(bank: Tensor, bank_labels: Tensor, query: Tensor, k: int, num_classes: int) -> int:
    """One query: sort all similarities, weigh the first k votes."""
    similarity = [float(query @ row) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
    votes = [0.0] * num_classes
    for i in nearest:
        votes[int(bank_labels[i])] += math.exp(similarity[i] / 0.07)
    return max(range(num_classes), key=lambda c: votes[c])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(10, 40), chunk=st.sampled_from([2, 1024]))
def test_vote_is_dinos(seed: int, size: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (F.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64)) for n in (size, 5))
    labels = torch.randint(0, 3, (size,), generator=generator)
    old, knn.CHUNK = knn.CHUNK, chunk
    try:
        predictions = knn.vote(bank, labels, queries, 3)
    finally:
        knn.CHUNK = old
    assert list(predictions) == [k for k in knn.NEIGHBOURS if k <= size]
    for k, predicted in predictions.items():
        assert predicted.tolist() == [slow_vote(bank, labels, query, k, 3) for query in queries]


def test_a_bank_smaller_than_every_k_votes_whole() -> None:
    bank = F.normalize(torch.randn(4, 3))
    assert list(knn.vote(bank, torch.tensor([0, 1, 0, 1]), bank, 2)) == [4]


def test_accuracy_counts_queries() -> None:
    bank = torch.eye(12)
    labels = torch.arange(12) % 3
    accuracy = knn.knn_accuracy(bank, labels, bank, labels, 3)
    assert accuracy[10] == 100
    wrong = knn.knn_accuracy(bank, labels, bank, (labels + 1) % 3, 3)
    assert wrong[10] == 0


def test_accuracy_is_over_the_queries_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank has 36 queries, all wrong."""
    monkeypatch.setattr(knn.dist, "all_reduce", lambda hits: hits.add_(torch.tensor([0.0, 36.0])))
    bank, labels = torch.eye(12), torch.arange(12) % 3
    assert knn.knn_accuracy(bank, labels, bank, labels, 3, world_size=2)[10] == 25


def test_a_limited_bank_is_the_first_samples_of_any_rank_count() -> None:
    recipe = recipes.debug()
    model = model_of(recipe).eval()
    whole, shares = [], []
    for world in (1, 3):
        for rank in range(world):
            loader = build_loader(
                "synthetic:100", batch_size=8, image_size=(28, 28), channels=1, rank=rank, world_size=world, train=False
            )
            try:
                found = features.features(model, recipe, loader, "mean", torch.device("cpu"), 37, world, quiet=True)
            finally:
                loader.close()
            (whole if world == 1 else shares).append(found)
    assert whole[0].ids.tolist() == list(range(37))
    own, split = (torch.cat([found.rows for found in parts]) for parts in (whole, shares))
    ids = torch.cat([found.ids for found in shares])
    torch.testing.assert_close(own, split[ids.argsort()])
    fewer = features.first(whole[0], 5)
    assert torch.equal(fewer.rows, own[:5])
    assert torch.equal(fewer.labels, whole[0].labels[:5])
    torch.testing.assert_close(own.norm(dim=1), torch.ones(37))


def test_vote_is_scikit_learns_weighted_vote() -> None:
    generator = torch.Generator().manual_seed(1)
    bank, queries = (F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64)) for n in (300, 90))
    labels = torch.randint(0, 6, (300,), generator=generator)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance**2 / 2) / knn.TEMPERATURE)  # of unit vectors: similarity = 1 - distance^2 / 2

    for k, predicted in knn.vote(bank, labels, queries, 6).items():
        theirs = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(bank.numpy(), labels.numpy())
        assert predicted.tolist() == theirs.predict(queries.numpy()).tolist()


def test_knn_refuses_what_does_not_fit_and_says_where_it_comes_from(run: Path, tmp_path: Path) -> None:
    one = prepare(flat_folder(tmp_path / "one"), tmp_path / "one.beton")
    assert "k is 50, more than the 48 training images that vote" in refused(knn, run, *DATA, "--k", "5", "50")
    assert "k is 9, more than the 8 training" in refused(knn, run, *DATA, "--k", "9", "--bank_size", "0", "8")
    assert "bank_size is 49, more than the 48 training images of synthetic:48; use 0 for all" in refused(
        knn, run, *DATA, "--bank_size", "8", "49"
    )
    assert "labels are missing" in refused(knn, run, "--train_path", one, "--val_path", one)
    start(knn, run, *DATA, "--k", "5", "7", "-o", tmp_path / "knn.json")
    found = read(tmp_path / "knn.json")
    assert list(found["accuracy"]) == ["5", "7"]
    assert found["effective_epochs"] == 1.0
    assert len(found["checkpoint_hash"]) == 64


def test_what_the_sets_cannot_serve_is_told_before_the_features(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        raise RuntimeError("features were computed")

    monkeypatch.setattr(knn, "_side", work)
    for flags in (["--k", "49"], ["--k", "9", "--bank_size", "8"], ["--bank_size", "49"]):
        with pytest.raises(UserError, match="more than the"):
            knn.main([str(run), *DATA, *flags])
    for flags in ([], ["--k", "48", "--bank_size", "48", "0"]):
        with pytest.raises(RuntimeError, match="features were computed"):
            knn.main([str(run), *DATA, *flags])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("set.json", "would overwrite what is read or was saved"),
        ("run/deepspeed.json", "would overwrite what is read or was saved"),
        ("z.csv", r"expected a name that ends in \.json"),
        ("z", r"expected a name that ends in \.json"),
        ("folder.json", "which is a folder; name a file"),
        ("set.beton/z.json", "and that is a file"),
    ],
)
def test_a_place_that_cannot_be_is_told_before_the_features(
    output: str, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("set.beton", "set.json"):
        (tmp_path / name).touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "run").symlink_to(run)
    monkeypatch.setattr(knn, "evaluate", None)
    for side in ("--train_path", "--val_path"):
        sets = [*DATA, side, str(tmp_path / "set.beton")]
        with pytest.raises(UserError, match=rf"^output is {tmp_path / output}.*{message}"):
            knn.main([str(run), *sets, "-o", str(tmp_path / output)])


def test_every_weights_and_bank_have_figures_of_their_own(run: Path) -> None:
    """Against the vote on features of whole, undistorted sets."""
    found = knn.main([str(run), *DATA, "--k", "5", "--bank_size", "0", "8", "--weights", "student", "untrained"])
    assert len(set(found.files)) == 4
    few = knn.main([str(run), *DATA, "--k", "5", "--bank_size", "8"])  # 8 voters, and still all queries
    assert few.accuracies["student", 8] == found.accuracies["student", 8]
    for weights in ("student", "untrained"):
        model, recipe = load_weights(run, weights)
        sets = []
        for path in ("synthetic:48", "synthetic:21"):
            loader = build_loader(path, batch_size=48, image_size=(28, 28), channels=1, train=False)
            sets.append(features.features(model, recipe, loader, "cls", torch.device("cpu"), quiet=True))
            loader.close()
        bank, queries = sets
        assert len(queries.rows) == 21
        for size in (0, 8):
            part = features.first(bank, size)
            assert len(part.rows) == (size or 48)
            want = knn.knn_accuracy(part.rows, part.labels, queries.rows, queries.labels, 10, neighbours=(5,))
            assert found.accuracies[weights, size] == want
    epochs = {path.name: read(path)["effective_epochs"] for path in found.files}
    assert epochs == {
        "knn_student_cls.json": 1.0,
        "knn_student_cls_8.json": 1.0,
        "knn_untrained_cls.json": 0,
        "knn_untrained_cls_8.json": 0,
    }


def test_a_result_lies_beside_the_run_of_a_checkpoint_and_in_one_that_has_none(run: Path, tmp_path: Path) -> None:
    """`report` looks in the run; what lies above a checkpoint that was copied out may be somebody else's."""
    kept = checkpoint_of(run)
    lone = shutil.copytree(kept, tmp_path / "another_run" / "folder" / "copied")
    (tmp_path / "link").symlink_to(kept)
    (lone.parent.parent / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "images_per_second": 1e-9}\n')
    (lone.parent.parent / "versions.json").write_text('{"world_size": 1}')
    beside = run / f"knn_student_cls_{kept.name}.json"
    for source, place in ((kept, beside), (tmp_path / "link", beside), (lone, lone / "knn_student_cls.json")):
        found = knn.main([str(source), *DATA, "--k", "5"])
        assert [path.resolve() for path in found.files] == [place.resolve()]
        assert read(place)["checkpoint_hash"] == read(beside)["checkpoint_hash"]
    assert read(lone / "knn_student_cls.json")["pretraining_gpu_hours"] == 0
    with pytest.raises(UserError, match="would overwrite what is read or was saved"):
        knn.main([str(lone), *DATA, "-o", str(lone / "manifest.json")])
    beside.unlink()
