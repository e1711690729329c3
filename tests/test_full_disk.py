"""Every writer of the package against a disk that is full: one clear line, nothing half-written, the old file intact.

What belongs to a training that goes on warns instead. A whole run whose disk fills is in checkpoint/test_saver.py, the
journal in run/test_records.py.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm.models
import torch
import torch.distributed as dist
from PIL import Image

from bench.common import write_json
from fasthpm import pretrain, recipes
from fasthpm.__main__ import dispatch
from fasthpm.checkpoint import folder as checkpoint_folder
from fasthpm.checkpoint import shards
from fasthpm.data import DatasetInfo, build_loader
from fasthpm.data.bad import BadSample
from fasthpm.data.statistics import statistics_of
from fasthpm.errors import UserError
from fasthpm.exchange import importing
from fasthpm.exchange.forms import FORMS
from fasthpm.files import file_hash
from fasthpm.maps import run as maps_run
from fasthpm.patches import model_of
from fasthpm.pictures import report
from fasthpm.probes import linear, online, result
from fasthpm.probes.finetune import command
from fasthpm.probes.finetune.settings import FineTune
from fasthpm.ranks.launch import Launch
from fasthpm.ranks.watchdog import Watchdog
from fasthpm.recipe import save_recipe
from fasthpm.run.bad_samples import BadSampleLog
from fasthpm.run.journal import Journal
from fasthpm.run.metrics import Metrics
from fasthpm.run.records import METRICS_FILE, append_line
from fasthpm.tuning import loop
from tests.helpers.disk import fill, mounted

LAUNCH = Launch(0, 0, 1, 1, torch.device("cpu"))
INFO = DatasetInfo(40, 1, (0.3,), (0.2,), ("a", "b"))
PAGE = 4096
VIDEO = {"model": "hpm_vit_nano_patch8_32_video", "num_frames": 4, "tubelet_size": 2, "input_size": "32"}
Write = Callable[[], object]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    with mounted(tmp_path / "disk", 24) as folder:
        yield folder


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files below `folder`, what fills the disk left out."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "filler"]
    return {str(path.relative_to(folder)): file_hash(path) for path in paths}


# -------------------------------------------------------------------------------------------------- what is written
def write_run(folder: Path, **changes: Any) -> Path:
    """A run of untrained weights, as an import writes it."""
    recipe = dataclasses.replace(recipes.debug(), channels=3, **changes)
    state = checkpoint_folder.cpu_state(model_of(recipe))
    importing.write_run(folder, importing.Imported(recipe, {"student": state}, {}, "hpm", False, []), {})
    return folder


def logged_run(folder: Path, name: str = "run") -> Path:
    """What a report needs of a run."""
    run = folder / name
    run.mkdir(parents=True)
    save_recipe(dataclasses.replace(recipes.debug(), steps_per_epoch=2), run / "recipe.json")
    versions = {"torch": "1", "deepspeed": "2", "fasthpm": "3", "commit": "abc", "world_size": 2, "device": "CPU"}
    (run / "versions.json").write_text(json.dumps(versions))
    names = {*report.TABLE, *(name for _, group in report.CURVES for name in group)}
    lines = [json.dumps({"step": step, "epoch": step / 2, **dict.fromkeys(names, 1.0)}) for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    return run


def comparison(disk: Path, inputs: Path) -> Write:
    runs = [str(logged_run(inputs, name)) for name in ("one", "two")]
    return lambda: dispatch(["report", *runs, "-o", str(disk / "out")])


def one_report(disk: Path, inputs: Path) -> Write:
    run = logged_run(disk)
    return lambda: dispatch(["report", str(run)])


def panel(disk: Path, inputs: Path) -> Write:
    flags = ["--data_path", "synthetic:16", "--num_images", "4", "-o", str(disk / "out" / "panel.png")]
    run = write_run(inputs / "run")
    return lambda: dispatch(["visualize", str(run), *flags])


def image_maps(disk: Path, inputs: Path) -> Write:
    run, images = write_run(inputs / "run"), inputs / "images"
    images.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(images / f"{number}.png")
    flags = ["--data_path", str(images), "--num_workers", "1", "-o", str(disk / "maps")]
    return lambda: dispatch(["maps", str(run), *flags])


def export(form: str) -> Callable[[Path, Path], Write]:
    def case(disk: Path, inputs: Path) -> Write:
        run = write_run(inputs / "run", **({**VIDEO, "patch_size": 8} if form == "hf_videomae" else {}))
        path = disk / "out" / FORMS[form].default
        return lambda: dispatch(["export", str(run), "--format", form, "-o", str(path)])

    return case


def import_run(disk: Path, inputs: Path) -> Write:
    return lambda: write_run(disk / "run")


def stored_maps(disk: Path, inputs: Path) -> Write:
    run = maps_run.RunMaps(disk / "maps", "attention", INFO, (7, 7), 2, patch_size=4)

    def write() -> None:
        shared: dict[str, Any] = {"image_size": (28, 28), "channels": 1, "num_workers": 1}
        loader = build_loader("synthetic:40", batch_size=8, train=False, whole=True, **shared)
        run.refresh(2, loader, lambda images: images[:, :7, :7, 0].flatten(1).float(), LAUNCH)

    return write


def linear_head(disk: Path, inputs: Path) -> Write:
    head, optimizer = linear.LinearHead(128, 10, 0), SimpleNamespace(state={})
    values = {"launch": LAUNCH, "head": head, "optimizer": optimizer, "identity": {}, "epoch": 1, "seconds": 1.0}
    return lambda: linear.save(cast(Any, SimpleNamespace(**values, folder=disk / "linear")))


def classifier(disk: Path, inputs: Path) -> Write:
    vit = timm.models.VisionTransformer(img_size=28, patch_size=4, embed_dim=64, depth=1, num_heads=2, num_classes=2)
    weights = {f"vit.{name}": value for name, value in vit.state_dict().items()}
    step, settings = SimpleNamespace(vit=vit), SimpleNamespace(global_pool="avg")
    notes = {checkpoint_folder.FINETUNE_NOTES: json.dumps({"model": {}})}
    run: Any = SimpleNamespace(step=step, settings=settings, notes=notes, info=INFO, pixels=statistics_of(INFO))
    return lambda: command.write_classifier(run, weights, disk / "classifier.safetensors")


def classifiers_result(disk: Path, inputs: Path) -> Write:
    figures = {"accuracy": 50.0, "accuracy_top5": 90.0}
    return lambda: command.report(FineTune(), {}, disk / "finetune", figures)


def finetunes_folder(disk: Path, inputs: Path) -> Write:
    settings, notes = FineTune(output_dir=str(disk / "finetune")), {checkpoint_folder.FINETUNE_NOTES: "{}"}
    run: Any = SimpleNamespace(settings=settings, notes=notes, recipe=recipes.debug(), num_parameters=0)
    return lambda: loop.prepare_output(run)


def pretrainings_folder(disk: Path, inputs: Path) -> Write:
    resolved = {"accum_iter": 1, "global_batch_size": 8}
    recipe = dataclasses.replace(recipes.debug(), output_dir=str(disk / "run"), **resolved)
    run: Any = SimpleNamespace(recipe=recipe, launch=LAUNCH, num_parameters=0, attention={})
    return lambda: pretrain.prepare_output(run)


def knn_result(disk: Path, inputs: Path) -> Write:
    return lambda: result.write_text(disk / "run" / "knn.json", "{}")


def bench_result(disk: Path, inputs: Path) -> Write:
    return lambda: write_json(disk / "bench" / "step.json", {})


SMALL: dict[str, Callable[[Path, Path], Write]] = {
    "linear head": linear_head,
    "fine-tuning's result": classifiers_result,
    "fine-tuning's folder": finetunes_folder,
    "pretraining's folder": pretrainings_folder,
    "k-NN result": knn_result,
    "bench result": bench_result,
    "maps": stored_maps,
}
LARGE: dict[str, Callable[[Path, Path], Write]] = {  # more than a page
    "classifier": classifier,
    "report": one_report,
    "comparison": comparison,
    "panel": panel,
    **{f"export {form}": export(form) for form in ("timm", "torchvision", "mae", "safetensors")},
}
ONCE: dict[str, Callable[[Path, Path], Write]] = {  # larger than a page, and never replaced
    "import": import_run,
    "maps of images": image_maps,
    **{f"export {form}": export(form) for form in ("hf_vit", "hf_vitmae", "hf_videomae")},
}
CASES = [(name, 0) for name in (*SMALL, *LARGE, *ONCE)] + [(name, PAGE) for name in (*LARGE, *ONCE)]


@pytest.mark.parametrize(("name", "left"), CASES)
def test_a_full_disk_is_one_line_and_changes_nothing(name: str, left: int, disk: Path, tmp_path: Path) -> None:
    write = (SMALL | LARGE | ONCE)[name](disk, tmp_path / "inputs")
    if name not in ONCE:
        write()
    before = contents(disk)
    assert bool(before) is (name not in ONCE)
    fill(disk, leave=left)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); \w") as found:
        write()
    assert "\n" not in str(found.value)
    assert contents(disk) == before
    assert not list(disk.rglob(".writing-*"))
    (disk / "filler").unlink()
    write()
    assert contents(disk).keys() >= before.keys()


# -------------------------------------------------------------------------------------------------- training goes on
def warnings_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_the_online_probes_head_costs_a_warning(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step: Any = SimpleNamespace(student=SimpleNamespace(embed_dim=128))
    probe = online.OnlineProbe(recipes.debug(), step, INFO, LAUNCH)
    journal = Journal(disk / "journal", "train", rank=0, total_steps=8, first_step=0)
    probe.save(disk, 2)
    before = file_hash(disk / online.HEAD)
    fill(disk)
    for done in (4, 6):
        with journal.surviving_the_disk(done, "the online probe"):
            probe.save(disk, done)
    assert warnings_of(capsys) == [
        "warning: the online probe of update 4 could not be written (No space left on device); training goes on"
    ]
    assert file_hash(disk / online.HEAD) == before
    assert not list(disk.rglob(".writing-*"))
    (disk / "filler").unlink()
    with journal.surviving_the_disk(8, "the online probe"):
        probe.save(disk, 8)
    assert file_hash(disk / online.HEAD) != before
    journal.close()


def test_an_older_test_never_stands_for_one_that_was_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, settings = SimpleNamespace(total_steps=4), FineTune(output_dir=str(tmp_path))
    run: Any = SimpleNamespace(settings=settings, recipe=recipe, done=4, layout=None, teacher=None)
    monkeypatch.setattr("fasthpm.ranks.zero.full_state", lambda layout, kind: {})
    monkeypatch.setattr(command, "write_classifier", lambda run, weights, path: path.touch())
    append_line(tmp_path / METRICS_FILE, json.dumps({"step": 2, "accuracy": 50.0}))
    append_line(tmp_path / METRICS_FILE, json.dumps({"step": 4, "loss": 1.0}))
    with pytest.raises(UserError, match="lacks the last test; make room, and add --evaluate to test again"):
        command.finish(run)
    assert (tmp_path / "classifier.safetensors").is_file()
    assert not (tmp_path / "result.json").exists()


def test_a_list_of_bad_samples_costs_a_warning(
    disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    met = [BadSample(3, "x/3.png", "is cut off")]
    loader: Any = SimpleNamespace(bad_samples=lambda: met, info=INFO)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_gather_object", lambda everybody, own: everybody.__setitem__(0, own))
    monkeypatch.setattr("fasthpm.ranks.agree", lambda error: None)
    log = BadSampleLog(disk, "x", 0.5, rank=0, keep=False)
    assert log.update(loader) == 1
    fill(disk)
    met.append(BadSample(5, "x/5.png", "is empty"))
    assert log.update(loader) == 2
    assert warnings_of(capsys) == [
        f"warning: {log.path} could not be written (No space left on device); training goes on"
    ]
    assert log.path.read_text().splitlines() == ["sample,name,why", "3,x/3.png,is cut off"]
    (disk / "filler").unlink()
    met.append(BadSample(7, "x/7.png", "is empty"))
    log.update(loader)
    assert [line[0] for line in log.path.read_text().splitlines()] == ["s", "3", "5", "7"]
    assert BadSampleLog(disk, "x", 0.5, rank=0, keep=True).count == 3


def test_what_is_not_finite_is_not_kept_and_no_rank_ends_alone(disk: Path) -> None:
    shared: dict[str, Any] = {"total_steps": 9, "first_step": 0, "flops_per_sample": 1.0, "matmul_rate": 1.0}
    metrics = Metrics(disk / "run", rank=0, world_size=1, device=LAUNCH.device, **shared)
    fill(disk)
    folder = metrics.save_forensics(3)
    assert not list(folder.iterdir())
    (disk / "filler").unlink()
    assert [path.name for path in metrics.save_forensics(3).iterdir()] == ["rank0.pt"]
    metrics.close()


def test_a_rank_that_cannot_note_what_it_does_goes_on(disk: Path) -> None:
    with Watchdog(disk, 0, 1, timeout=0.5) as watchdog:
        fill(disk)
        for update in range(10):
            watchdog.progressed(update)
            time.sleep(0.05)
    assert not list(disk.rglob("*.json"))


def test_a_checkpoint_that_cannot_hold_its_notes_is_not_begun(disk: Path) -> None:
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint_folder.begin(disk, 4, {"finetune.json": "{}"})
    assert not list((disk / "checkpoints").iterdir())
    (disk / "filler").unlink()
    assert (checkpoint_folder.begin(disk, 4, {"finetune.json": "{}"}) / "finetune.json").read_text() == "{}"


def test_a_rank_whose_part_does_not_fit_leaves_none(disk: Path) -> None:
    taken = shards.Snapshot({"0/master": torch.zeros(1 << 20)}, {})
    fill(disk, leave=1 << 20)
    with pytest.raises(OSError, match="No space left on device"):
        shards.write(taken, shards.rank_file(disk, 0))
    assert contents(disk) == {}
