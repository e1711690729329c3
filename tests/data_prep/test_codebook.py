"""A codebook of patches: found again where it is known, the same for the same seed, refused where it can't be."""

from pathlib import Path

import pytest
import torch

from data_prep import codebook
from fasthpm.errors import UserError
from fasthpm.tokenizers import load_codebook, nearest

FLAGS = ["--patch_size", "4", "--input_size", "28", "--channels", "1", "--num_workers", "1"]


def test_known_clusters_are_found() -> None:
    """Six far apart: every code is the mean of the rows nearest to it, as a slow Lloyd step finds it."""
    torch.manual_seed(0)
    centres = 10 * torch.randn(6, 8)
    rows = centres.repeat(100, 1) + 0.1 * torch.randn(600, 8)
    found = codebook.cluster(rows, 6, 20, seed=1)
    assert found.distance < 0.02
    assert found.perplexity == pytest.approx(6, rel=0.01)
    ids = nearest(rows, found.codes)
    for number, code in enumerate(found.codes):
        torch.testing.assert_close(code, rows[ids == number].mean(0), atol=1e-3, rtol=1e-3)


def test_the_command_writes_what_pretraining_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["synthetic:64", *FLAGS, "--size", "8", "--patches", "600", "--passes", "2"]
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for path, seed in zip(paths, ("0", "0", "1"), strict=True):
        codebook.main([flags[0], str(path), *flags[1:], "--seed", seed])
    assert "--target_dim 8" in capsys.readouterr().out
    books = [load_codebook(path) for path in paths]
    assert books[0].codes.shape == (8, 16)
    assert torch.equal(books[0].codes, books[1].codes)
    assert not torch.equal(books[0].codes, books[2].codes)
    assert [path.name for path in tmp_path.iterdir() if path not in paths] == []
    with torch.no_grad():
        ids = books[0](torch.randint(0, 256, (2, 28, 28, 1), dtype=torch.uint8))
    assert ids.shape == (2, 49)
    torch.testing.assert_close(books[0].codes.mean(1), torch.zeros(8), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--size", "1"], "size is 1, expected 2 or more"),
        (["--size", "50", "--patches", "20"], "patches 20 are fewer than the 50 codes"),
        (["--input_size", "30"], "input_size 30 is not a multiple of patch_size 4"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, flags: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        codebook.main(["synthetic:64", str(tmp_path / "x.safetensors"), *FLAGS, *flags])
    with pytest.raises(UserError, match=r"is no \.safetensors file"):
        codebook.main(["synthetic:64", str(tmp_path / "x.pt"), *FLAGS])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_does_not_do_is_refused_before_any_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codebook, "take_patches", lambda _: pytest.fail("images were read"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for name, problem in (("file/x.safetensors", "and that is a file"), ("folder.safetensors", "which is a folder")):
        with pytest.raises(UserError, match=problem):
            codebook.main(["synthetic:64", str(tmp_path / name), *FLAGS])


def test_folders_above_it_are_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "x.safetensors"
    codebook.main(["synthetic:64", str(out), *FLAGS, "--size", "2", "--patches", "100", "--passes", "1"])
    assert out.is_file()
