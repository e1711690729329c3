"""Samples that do not decode: replaced by rule, counted, and the end of the run if too many."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasthpm.data import bad as quarantine
from fasthpm.data import build_loader, read_info
from fasthpm.data.ffcv.beton import open_beton
from fasthpm.data.sampling import random_crops, replacements, sample_order
from fasthpm.errors import UserError
from tests.helpers.data_fixtures import image_folder, list_sources, prepare
from tests.helpers.loaders import SIZE, N, break_sample, joined, same


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sources of which some samples do not decode, and which these are."""
    root = tmp_path_factory.mktemp("broken")
    folder = image_folder(root / "folder", N)
    beton = prepare(folder, root / "set.beton")
    bad = (2, 7, 8, 20)
    list_sources(beton, [f"n{sample}.png" for sample in range(N)])
    for sample in bad:
        break_sample(beton, sample)
    paths = sorted((folder / "ant").iterdir()) + sorted((folder / "bee").iterdir())
    for sample, content in zip(bad, (b"", b"no image", paths[0].read_bytes()[:100], bytes(500)), strict=True):
        paths[sample].write_bytes(content)
    return {"ffcv": str(beton), "plain": str(folder), "names": {"ffcv": "n{}.png", "plain": paths}, "bad": bad}


def load_broken(broken: dict[str, Any], kind: str, **options: Any) -> Any:
    values = {"batch_size": 6, "image_size": SIZE, "channels": 3, "seed": 5, "num_workers": 2} | options
    return build_loader(broken[kind], **values)


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_bad_samples_are_replaced_by_rule(broken: dict[str, Any], kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Against the rule stated one sample at a time; the replacements look as they do in their own place."""
    loader, bad = load_broken(broken, kind), broken["bad"]
    replaced = 0
    for epoch in range(3):
        found = joined(list(loader))
        asked = sample_order(5, epoch, N)[: len(found.ids)].tolist()
        expected = []
        for sample in asked:
            attempts = (int(replacements(5, epoch, np.array([sample]), k, N)[0]) for k in range(1, 21))
            expected.append(next(k for k in attempts if k not in bad) if sample in bad else sample)
        assert found.ids.tolist() == expected
        assert found.replaced.tolist() == [sample in bad for sample in asked]
        ids, sizes = found.ids.numpy(), found.sizes.numpy()
        assert np.array_equal(found.crops, random_crops(5, epoch, ids, sizes, 0.2, True))
        assert (sizes == (40, 48)).all()
        places = {sample: row for row, sample in enumerate(ids.tolist()) if not found.replaced[row]}
        for row in found.replaced.nonzero().flatten().tolist():
            twin = places.get(int(ids[row]))
            if twin is not None:
                assert torch.equal(found.images[row], found.images[twin])
                assert found.labels[row] == found.labels[twin]
                replaced += 1
    assert replaced > 3
    names = broken["names"][kind]
    texts = [names.format(k) if kind == "ffcv" else str(names[k]) for k in bad]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == len(bad)
    assert all(sum(text in line for line in warnings) == 1 for text in texts)
    assert sorted(entry.sample for entry in loader.bad_samples()) == list(bad)
    loader.close()


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_ranks_threads_and_resumed_runs_agree_on_replacements(broken: dict[str, Any], kind: str) -> None:
    whole = list(load_broken(broken, kind, num_workers=1))
    assert sum(int(batch.replaced.sum()) for batch in whole) >= 2
    for world_size in (2, 3):
        options = {"batch_size": 6 // world_size, "world_size": world_size}
        ranks = [list(load_broken(broken, kind, rank=r, **options)) for r in range(world_size)]
        for reference, *parts in zip(whole, *ranks, strict=True):
            assert same(reference, joined(parts))
    for start in range(1, len(whole)):
        resumed = load_broken(broken, kind)
        resumed.load_state_dict({"epoch": 0, "batch": start})
        assert all(same(a, b) for a, b in zip(whole[start:], resumed, strict=True))


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_too_many_bad_samples_end_the_run_and_are_named(
    broken: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"1 sample does not decode, max_bad_samples 0 allows 0 of the 23 in") as error:
        list(load_broken(broken, kind, batch_size=1, max_bad_samples=0.0))
    assert "\n" not in str(error.value)
    monkeypatch.setattr(quarantine, "FEWEST", 1)
    monkeypatch.setattr(quarantine, "NAMED", 2)
    with pytest.raises(
        UserError, match=r"4 samples do .* 0\.15 allows 3 of the 23 in .*: .* and 2 more \(all are named in"
    ):
        list(load_broken(broken, kind, batch_size=23, max_bad_samples=0.15))
    assert len(list(load_broken(broken, kind, batch_size=23, max_bad_samples=0.2))) == 1


def test_a_tenth_of_a_percent_but_at_least_ten_bad_samples_are_put_up_with() -> None:
    assert [quarantine.allowed(*case) for case in ((0.001, 100), (0.001, 10**6), (0.5, 40), (0.0, 10**6))] == [
        10,
        1000,
        20,
        0,
    ]


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_evaluation_replaces_nothing_unless_asked(broken: dict[str, Any], kind: str) -> None:
    loader = load_broken(broken, kind, batch_size=2, train=False)
    iterator = iter(loader)
    next(iterator)
    name = r"n2\.png \(.*set\.beton, sample 2\) does not decode" if kind == "ffcv" else r"004\.png cannot be read"
    with pytest.raises(UserError, match=name):
        next(iterator)
    loader.close()
    found = joined(list(load_broken(broken, kind, batch_size=2, train=False, max_bad_samples=1.0)))
    assert found.replaced.nonzero().flatten().tolist() == list(broken["bad"])


@pytest.mark.parametrize("kind", ["ffcv", "plain"])
def test_a_set_without_a_good_sample_is_an_error(tmp_path: Path, kind: str) -> None:
    folder = image_folder(tmp_path / "folder", 4)
    source = prepare(folder, tmp_path / "set.beton") if kind == "ffcv" else folder
    loader = build_loader(source, batch_size=4, image_size=(8, 8), channels=3)
    for sample, path in enumerate(sorted(folder.rglob("*.png"))):
        if kind == "ffcv":
            break_sample(source, sample)
        else:
            path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"nor do 20 samples drawn in its place; .* is damaged"):
        list(loader)
    loader.close()
    if kind == "plain":
        with pytest.raises(UserError, match=r"000\.png cannot be read"):
            read_info(folder)


def test_a_jpeg_that_ends_early_is_no_image(tmp_path: Path) -> None:
    """turbojpeg fills in grey and only warns."""
    out = prepare(image_folder(tmp_path / "folder", 4), tmp_path / "set.beton")
    break_sample(out, 1, keep=int(open_beton(out).lengths[1]) * 3 // 4)
    loader = build_loader(out, batch_size=4, image_size=(8, 8), channels=3)
    (batch,) = loader
    loader.close()
    assert [entry.sample for entry in loader.bad_samples()] == [1]
    assert 1 not in batch.ids
