"""What one update of a recipe asks of the GPU.

    python -m tests.nullgpu.update '[{"recipe": "hpm_vit_base_in1k_200e", "batch_size": 256}, …]'

Fields beside "recipe" are the recipe's; the last of three updates is counted, the EMA and all that DeepSpeed does
included. Prints one JSON object with a `card.Watch.summary` per case, in order, and its launches by phase.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.nullgpu import card


@contextmanager
def without_values() -> Iterator[None]:
    """Weights are not initialised: on the null GPU they would be garbage soon."""
    names = ("xavier_uniform_", "trunc_normal_", "normal_", "kaiming_uniform_", "uniform_")
    kept = {name: getattr(torch.nn.init, name) for name in names}
    for name in names:
        setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    yield
    for name, function in kept.items():
        setattr(torch.nn.init, name, function)


class Built:
    """A recipe's engine, teacher and one batch, as fasthpm.pretrain has them; `changes`: fields of the recipe."""

    def __init__(self, launch: Any, name: str, **changes: Any) -> None:
        from fasthpm import ranks, recipes
        from fasthpm.data import DatasetInfo
        from fasthpm.difficulty import HEAD
        from fasthpm.patches import model_of
        from fasthpm.speed import graph
        from fasthpm.step import Step
        from fasthpm.teacher import EMATeacher

        changes = {"global_batch_size": 0, "accum_iter": 1, "deepspeed_config": "zero1_bf16"} | changes
        self.recipe = recipe = dataclasses.replace(recipes.from_name(name), **changes).resolve(10**6, 1)
        channels = recipe.channels
        info = DatasetInfo(1, channels, (0.5,) * channels, (0.25,) * channels, ("any",))
        with without_values():
            self.step = Step(model_of(recipe), recipe, info)
            config = ranks.merge_config(recipe.deepspeed_config, recipe, 1)
            with graph.recordable(launch.device):
                self.engine = ranks.build_engine(self.step, recipe, config, launch)
            self.teacher = None
            if recipe.uses_teacher:
                copy = model_of(recipe)
                self.teacher = EMATeacher(self.engine, self.step.student, "student.", copy, 0.999, HEAD)
                self.step.attach_teacher(self.teacher.module)
        shape, device = (recipe.batch_size, *recipe.sample_shape), launch.device
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        self.ids = torch.arange(recipe.batch_size, device=device)
        self.maps = torch.rand(recipe.batch_size, recipe.num_patches).to(device) if recipe.uses_maps else None

    def update(self, number: int, mark: Any = lambda phase: None, micro_step: Any = None) -> None:
        """One update, as fasthpm.pretrain makes it; `mark` is called after each phase, unless a `micro_step` of
        fasthpm.speed.graph does all of them."""
        from fasthpm import ranks, schedule

        device = self.images.device
        ranks.set_lr(self.engine, schedule.lr_at(self.recipe, number))
        alpha = torch.full((), 0.25, dtype=torch.float64, device=device)
        update = torch.full((), number, device=device)
        for _ in range(self.recipe.accum_iter):
            if micro_step:
                micro_step(self.images, self.ids, update, alpha, self.maps)
                continue
            output = self.engine(self.images, self.ids, update, alpha, self.maps)
            mark("forward")
            self.engine.backward(output.loss)
            mark("backward")
            self.engine.step()
            mark("step")
        ranks.grad_norm(self.engine)


def counted(launch: Any, case: dict[str, Any]) -> dict[str, Any]:
    """The third update of one case; `peak` is without what earlier cases have left behind."""
    gc.collect()
    before, start = torch.cuda.memory_allocated(), time.process_time()
    built = Built(launch, case["recipe"], **{name: value for name, value in case.items() if name != "recipe"})
    for number in range(2):
        built.update(number)
    phases = dict.fromkeys(("forward", "backward", "step"), 0)
    with card.Watch() as watch:

        def mark(phase: str) -> None:
            phases[phase] += watch.launches() - sum(phases.values())

        built.update(2, mark)
    found = watch.summary | {"phases": phases, "seconds": time.process_time() - start}
    return found | {"peak": watch.peak - before}


def main() -> None:
    card.prepare()
    from fasthpm import ranks

    with ranks.session() as launch:
        assert launch.device.type == "cuda"
        card.report({"cases": [counted(launch, case) for case in json.loads(sys.argv[1])]})


if __name__ == "__main__":
    main()
