"""Which samples are stored, where, and in which order."""

from pathlib import Path

import numpy as np

from data_prep import images, verify
from data_prep.plan import stored_order
from data_prep.sources import open_source
from tests.helpers.data_fixtures import image_folder, prepare
from tests.helpers.prepared_sets import named


def test_validation_splits_are_seeded_stratified_and_disjoint(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", 30)
    for index in range(10):
        (folder / "ant" / f"more{index}.png").write_bytes((folder / "ant" / "000.png").read_bytes())
    source = open_source(str(folder))

    def drawn(**flags: float) -> np.ndarray:
        return images.draw_validation(source, flags.get("fraction"), flags.get("count"), int(flags.get("seed", 0)))

    assert np.bincount(source.labels[drawn(fraction=0.2)]).tolist() == [5, 3]
    assert np.bincount(source.labels[drawn(count=9)]).tolist() in ([6, 3], [5, 4])
    assert (drawn(count=9) == drawn(count=9)).all()
    assert (drawn(count=9) != drawn(count=9, seed=1)).any()
    out = prepare(folder, tmp_path / "a.beton", "--val_fraction", "0.2")
    train, val = named(out), named(tmp_path / "a_val.beton")
    assert (len(train), len(val)) == (32, 8)
    assert sorted(train + val) == sorted(source.names)
    verify.main([str(tmp_path / "a_val.beton")])
    whole = prepare(folder, tmp_path / "b.beton")
    assert [name for name in named(whole) if name in set(train)] == train  # the order is the whole set's


def test_samples_that_belong_together_stay_together(tmp_path: Path) -> None:
    class Grouped:
        groups = np.repeat(np.arange(10), 7)

        def __len__(self) -> int:
            return 70

    order = stored_order(Grouped(), 0)
    assert sorted(order.tolist()) == list(range(70))
    runs = Grouped.groups[order].reshape(10, 7)
    assert (runs == runs[:, :1]).all()
    assert runs[:, 0].tolist() != sorted(runs[:, 0])
    assert any(np.diff(piece).min() < 0 for piece in order.reshape(10, 7))
