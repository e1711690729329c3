"""What an import is asked for: idle flags, and folders that are something else's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fasthpm.checkpoint.weights import OF_A_RUN
from fasthpm.errors import UserError
from fasthpm.exchange import importing
from fasthpm.exchange.asked import check_folder
from tests.helpers.published import FLAGS, published, run_import

IDLE_FOR_IMAGES = {"num_frames": "7", "sampling_rate": "3"}
IDLE_FOR_ENCODERS = {"mask_ratio": "0.6", "norm_pix_loss": "", "no-norm_pix_loss": "", "decoder_heads": "4"}


def words(name: str, value: str) -> list[str]:
    return [f"--{name}", *([value] if value else [])]


@pytest.mark.parametrize("base", [[], ["--recipe", "mae_vit_base_in1k_200e"], ["--encoder_only"]])
@pytest.mark.parametrize("name", IDLE_FOR_IMAGES)
def test_flags_of_clips_are_refused_for_images(tmp_path: Path, name: str, base: list[str]) -> None:
    save_file(published(predictor="--recipe" not in base), tmp_path / "a.safetensors")
    given = [*([] if base == ["--encoder_only"] else FLAGS), *base, *words(name, IDLE_FOR_IMAGES[name])]
    with pytest.raises(UserError, match=f"--{name} has no effect here: the file is of a model of images; leave it out"):
        run_import(tmp_path / "a.safetensors", tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", IDLE_FOR_ENCODERS)
def test_flags_of_decoders_are_refused_for_an_encoder_alone(tmp_path: Path, name: str) -> None:
    save_file(published(), tmp_path / "a.safetensors")
    given = ["--encoder_only", *words(name, IDLE_FOR_ENCODERS[name])]
    with pytest.raises(UserError, match=f"--{name.removeprefix('no-')} has no effect here: the encoder alone is taken"):
        run_import(tmp_path / "a.safetensors", tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", OF_A_RUN[1:])
def test_a_folder_that_another_run_has_begun_is_no_place(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that a run writes before its first checkpoint; the file to import is not even read."""
    monkeypatch.setattr(importing, "import_weights", lambda *_, **__: pytest.fail("the file was read"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / name).touch()
    with pytest.raises(UserError, match=f"is of another run, whose {name} is there; choose another --output"):
        run_import(tmp_path / "a.safetensors", tmp_path / "run")
    assert not [*(tmp_path / "run" / "checkpoints").iterdir()]


def test_places_that_are_no_folders_are_refused_before_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, and a folder is written"):
        run_import(tmp_path / "missing.pth", tmp_path / "file")
    with pytest.raises(UserError, match="which would lie in"):
        run_import(tmp_path / "missing.pth", tmp_path / "file" / "run")


def test_what_a_killed_import_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / ".writing-step-00000000").mkdir(parents=True)
    (tmp_path / "run" / "knn_untrained_cls.json").touch()
    check_folder(tmp_path / "run")
    torch.save({"model": published()}, tmp_path / "a.pth")
    run_import(tmp_path / "a.pth", tmp_path / "run", *FLAGS)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]
