"""What a run is told of its attention."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fasthpm.commands import attention
from fasthpm.files import write_json
from fasthpm.recipe import Recipe
from fasthpm.recipe_fields import BACKENDS
from fasthpm.run.versions import versions
from fasthpm.speed.attention import KERNELS, Recorder
from tests.helpers.null_gpu import run_on_null_gpu
from tests.helpers.steps import ALPHA, batch, step_of

MODES: tuple[dict[str, Any], ...] = (
    {},
    {"decoder_attention": "cross", "teacher_maps": True},
    {"mask_policy": "attention", "predict_loss": "none", "throw_ratio": 0.2, "warmup_mask_ratio": 0.5},
    {"difficulty": "measured", "predict_loss": "none"},
)


@pytest.mark.parametrize("mode", MODES)
def test_the_shapes_are_those_of_a_real_step(mode: dict[str, Any]) -> None:
    step = step_of(batch_size=6, **mode)
    images, ids = batch()
    with Recorder() as recorder:
        for scores in [None, torch.rand(6, 49)] if step.recipe.uses_maps else [None]:
            step(images, ids, torch.tensor(0), ALPHA, scores)
    assert set(attention.shapes_of(step.recipe, torch.float32)) == recorder.found.keys()


def test_a_cpu_has_nothing_to_choose(capsys: pytest.CaptureFixture[str]) -> None:
    for backend, lines in (("auto", 0), ("flash", 1)):
        assert attention.settle(Recipe(attention_backend=backend), torch.device("cpu"), torch.float32) == {}
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_run_that_goes_on_keeps_its_kernels_on_the_same_machine(tmp_path: Path) -> None:
    """To the last bit: another start could find another one faster."""
    cpu, recipe = torch.device("cpu"), Recipe(output_dir=str(tmp_path))
    past = versions(cpu, 2) | {"attention": {"a shape": "cudnn"}}
    assert attention.known(recipe, cpu) == {}
    for change, found in (({}, past["attention"]), ({"device": "another"}, {}), ({"attention": None}, {})):
        write_json(tmp_path / "versions.json", past | change)
        assert attention.known(recipe, cpu) == found


def test_a_recipe_may_ask_for_every_kernel() -> None:
    assert ("auto", *KERNELS) == BACKENDS


def test_on_the_null_gpu_kernels_are_named_pinned_and_launched() -> None:
    """And pairs of patches are compared in at most ten launches, without waiting, inside a graph too."""
    found = run_on_null_gpu("tests.nullgpu.kernels")
    assert set(found["auto"].values()) == {"flash"}  # all take the same time there
    assert set(found["efficient"].values()) == {"efficient"}
    assert len(found["auto"]) == len(found["efficient"]) == 4
    assert found["launched"] == {"flash": 0, "efficient": 1}
    for pairs in found["pairs"]:
        assert pairs["launches"] <= 10
        assert pairs["waits"] == {"device": 0, "stream": 0, "event": 0}
        assert list(pairs["kernels"]) == ["health_kernel", "health_totals", "ranking_kernel", "ranking_totals"]
    (graph,) = found["graph"]
    assert graph.startswith("G graph of ")
