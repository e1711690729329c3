"""Pretraining: parse → build → loop.

    deepspeed --module fasthpm.pretrain --recipe NAME --data_path X.beton --output_dir OUT [flags]
    torchrun --nproc_per_node N -m fasthpm.pretrain …      # same flags
    fasthpm pretrain …                                      # one process

Flags keep MAE's spellings; each overrides one field of the recipe. A run continues by itself from the newest valid
checkpoint in its output_dir.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fasthpm import (
    checkpoint,
    engine,
    export,
    flops,
    fp8,
    maps,
    recipes,
    report,
    schedule,
    shards,
    targets,
    video_pictures,
    visualize,
    zero,
)
from fasthpm.bad_samples import BadSampleLog
from fasthpm.cli import Parser
from fasthpm.data import Batch, Loader, build_loader
from fasthpm.data.device import on_device
from fasthpm.errors import UserError
from fasthpm.health import NotFinite
from fasthpm.maps import RunMaps
from fasthpm.metrics import Metrics, measure_matmul_rate
from fasthpm.probes import online as online_probes
from fasthpm.recipe import Recipe, add_recipe_arguments, build_recipe, save_recipe, science_of
from fasthpm.saver import Job, Saver
from fasthpm.signals import StopSignals
from fasthpm.step import Step, model_of
from fasthpm.teacher import EMATeacher
from fasthpm.versions import versions
from fasthpm.watchdog import Watchdog

PANEL_IMAGES, PANEL_CLIPS = 8, 2


def parse_arguments(argv: Sequence[str] | None) -> Recipe:
    """The recipe that the command line asks for. **Raises:** `UserError` for anything unknown or out of range."""
    parser = Parser(prog="fasthpm pretrain", description=__doc__)
    parser.add_argument("--recipe", default="debug", help=f"start from: {', '.join(recipes.RECIPES)}, or a recipe.json")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers inject it
    add_recipe_arguments(parser)
    try:
        given = vars(parser.parse_args(argv))
        given.pop("local_rank")
        base = recipes.from_name(given.pop("recipe"))
        recipe = build_recipe({**dataclasses.asdict(base), **given}, source="command line")
        for name in ("data_path", "output_dir"):
            if not getattr(recipe, name):
                raise UserError(f"--{name} is missing; see fasthpm pretrain --help")
    except UserError as error:
        error.printed_elsewhere = os.environ.get("RANK", "0") != "0"  # every rank reads the same command line
        raise
    return recipe


@dataclasses.dataclass
class Run:
    """Everything a run holds between two updates."""

    recipe: Recipe
    launch: engine.Launch
    loader: Loader
    engine: Any
    step: Step
    teacher: EMATeacher | None
    layout: zero.MasterLayout
    saver: Saver
    maps: RunMaps | None = None
    bad_samples: BadSampleLog = dataclasses.field(init=False)
    seen: tuple[torch.Tensor, torch.Tensor | None] | None = None  # images and maps of the last micro-step
    done: int = 0  # updates
    saving: int = 0  # the update whose checkpoint was begun last
    unsaved: str = ""  # why it is lost, on rank 0
    preempted: bool = False  # a signal ends the run at this update
    skipped: list[int] = dataclasses.field(default_factory=list)  # updates (from 0) that are left out: not finite
    batches: Iterator[Batch] = dataclasses.field(init=False)  # from here on
    online: online_probes.OnlineProbe | None = None
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # further files of every checkpoint: name and text

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of the student, whatever share of them this rank holds."""
        return sum(slot.shape.numel() for group in self.layout.groups for slot in group.slots)

    def weights(self) -> dict[str, dict[str, torch.Tensor]]:
        """Full float32 {"student": …, "teacher": …} state dicts on rank 0, {} elsewhere. Collective."""
        kinds: dict[str, zero.State] = {"student": "master"}
        if self.teacher:
            kinds["teacher"] = "ema"
        gathered = {name: zero.full_state(self.layout, kind) for name, kind in kinds.items()}
        if self.launch.rank:
            return {}
        buffers = {name: value.float() for name, value in model_of(self.recipe).named_buffers()}
        return {
            name: {**{key.removeprefix("student."): value for key, value in (state or {}).items()}, **buffers}
            for name, state in gathered.items()
        }


def build(recipe: Recipe, launch: engine.Launch) -> Run:
    """Loader, DeepSpeed engine and teacher of a resolved run, at its first update or at its checkpoint."""
    with engine.in_agreement():
        recipe = checkpoint.continued(recipe, launch.world_size)
        accum_iter = recipe.accumulation(launch.world_size)
        loader = build_loader(
            recipe.data_path,
            batch_size=recipe.batch_size,
            image_size=recipe.image_size,
            channels=recipe.channels,
            seed=recipe.seed,
            rank=launch.rank,
            world_size=launch.world_size,
            num_workers=recipe.num_workers,
            accum_iter=accum_iter,
            num_frames=recipe.num_frames,
            sampling_rate=recipe.sampling_rate,
            crop_min=recipe.crop_min,
            flip=recipe.flip,
            interpolation=recipe.interpolation,
            color_jitter=recipe.color_jitter,
            sample_order=recipe.sample_order,
            max_bad_samples=recipe.max_bad_samples,
            decoder=recipe.video_decoder,
        )
        recipe = recipe.resolve(loader.info.num_samples, launch.world_size)
        checkpoint.compare_recipes(recipe, science_of)
        config = engine.merge_config(recipe.deepspeed_config, recipe, launch.world_size)
        online_probes.check(recipe, loader.info, config)
        if recipe.teacher_precision == "fp8":
            fp8.require_fp8(launch.device)
        student = checkpoint.initial_model(recipe)
        frozen = targets.build_frozen(recipe, launch.device)
    map_store = maps.for_recipe(recipe, loader.info)
    loader = on_device(maps.with_maps(loader, map_store), launch.device)
    step = Step(student, recipe, loader.info)
    deepspeed_engine = engine.build_engine(step, recipe, config, launch)
    if frozen:
        step.attach_frozen(frozen)
    teacher = None
    if recipe.uses_teacher:
        momentum = schedule.ema_momentum_at(recipe, 0)
        teacher = EMATeacher(deepspeed_engine, step.student, "student.", model_of(recipe), momentum)
        step.attach_teacher(teacher.module)
        if recipe.teacher_precision == "fp8":
            fp8.use_fp8(teacher.module)
    saver = Saver(launch.rank, launch.world_size, timeout=engine.timeout().total_seconds())
    run = Run(
        recipe, launch, loader, deepspeed_engine, step, teacher, zero.MasterLayout(deepspeed_engine), saver, map_store
    )
    run.batches = endless(loader)
    resume(run)
    run.online = online_probe(run)
    run.bad_samples = BadSampleLog(
        Path(recipe.output_dir), recipe.data_path, recipe.max_bad_samples, rank=launch.rank, keep=run.done > 0
    )
    return run


def online_probe(run: Run) -> online_probes.OnlineProbe | None:
    """The probe that the recipe asks for, with the head of the run that goes on."""
    recipe = run.recipe
    if not (recipe.online_probe_every or recipe.online_knn_every):
        return None
    with engine.in_agreement():
        probe = online_probes.OnlineProbe(recipe, run.step, run.loader.info, run.launch)
        probe.load(Path(recipe.output_dir), run.done)
    return probe


def resume(run: Run) -> None:
    """Load the checkpoint that the recipe asks for, the same on every rank, and say so."""
    found: list[Path | None] = [None]
    with engine.in_agreement():
        if run.launch.rank == 0:
            checkpoint.clear_unfinished(Path(run.recipe.output_dir))
            found[0] = checkpoint.find_resume(run.recipe, lambda line: print(f"warning: {line}", file=sys.stderr))
    dist.broadcast_object_list(found)
    if found[0] is not None:
        load(run, found[0])


def load(run: Run, folder: Path) -> None:
    """Put the run where a checkpoint of it stands, and say so. Collective."""
    with engine.in_agreement():
        state = checkpoint.read_state(folder)
        saved = shards.SavedState(folder)
    shards.restore(run.layout, saved)
    if run.teacher:
        run.teacher.refresh()
    # An update takes the same samples however many batches it is cut into.
    updates = state.loader["batch"] // state.accum_iter
    run.loader.load_state_dict({**state.loader, "batch": updates * run.recipe.accum_iter})
    run.batches = endless(run.loader)
    run.done = state.step
    run.skipped = sorted({*run.skipped, *state.skipped})
    with engine.in_agreement():
        if run.maps and not run.maps.due_at(run.done, run.recipe.steps_per_epoch):
            run.maps.open(run.done // run.recipe.steps_per_epoch)
    if run.launch.rank == 0:
        writers = f"{state.world_size} rank{'s' if state.world_size > 1 else ''}"
        ranks = f", written by {writers}" if state.world_size != run.launch.world_size else ""
        print(f"resuming from {folder} at update {run.done} of {run.recipe.total_steps}{ranks}", file=sys.stderr)


def save(run: Run) -> None:
    """Begin a checkpoint of all ranks; it is written while training goes on. Collective.

    A disk that is full loses this checkpoint, with a warning, and nothing else.
    """
    finish_saving(run)
    output_dir = Path(run.recipe.output_dir)
    aside = [""]
    run.saving, run.unsaved = run.done, ""
    if run.launch.rank == 0:
        try:
            checkpoint.require_space(output_dir, run.num_parameters)
            aside = [str(checkpoint.begin(output_dir, run.done))]
            for name, text in run.notes.items():
                (Path(aside[0]) / name).write_text(text)
        except (UserError, OSError) as error:
            not_saved(run, str(error))
    dist.broadcast_object_list(aside)
    if aside[0]:
        state = checkpoint.RunState(
            run.done, run.loader.state_dict(), run.launch.world_size, run.recipe.accum_iter, list(run.skipped)
        )
        run.saver.start(Job(Path(aside[0]), run.saver.take(run.layout), run.recipe, state))


def finish_saving(run: Run) -> None:
    """Wait for the checkpoint that is being written, and say so if the disk did not take it."""
    problem = run.saver.wait()
    if problem and run.launch.rank == 0:
        not_saved(run, problem)


def not_saved(run: Run, problem: str) -> None:
    """Note and print that the checkpoint begun last is lost."""
    run.unsaved = problem
    print(
        f"warning: the checkpoint of update {run.saving} was not written ({problem}); earlier ones are intact",
        file=sys.stderr,
    )


def finish_last_save(run: Run) -> None:
    """Wait for the last checkpoint, without which a run is not finished. Collective.

    **Raises:** `UserError` on all ranks if it was not written.
    """
    finish_saving(run)
    with engine.in_agreement():
        if run.unsaved:
            raise UserError(
                f"the checkpoint of update {run.saving}, the last, was not written; make room in "
                f"{run.recipe.output_dir} and start again to resume from the one before"
            )


def endless(loader: Loader) -> Iterator[Batch]:
    """Batches of this epoch and all that follow."""
    while True:
        yield from loader


def train(run: Run, metrics: Metrics, stop: StopSignals, watchdog: Watchdog) -> None:
    """The loop: batch, step, log, save; until the last update, or the one at which the ranks agree to stop."""
    recipe = run.recipe
    last = min(recipe.total_steps, recipe.stop_after or recipe.total_steps)
    if recipe.on_nonfinite == "rollback":
        save_first(run)
    while run.done < last and not run.preempted:
        if run.maps and run.maps.due_at(run.done, recipe.steps_per_epoch):
            refresh_maps(run, watchdog)
        turn(run, metrics, stop, watchdog, last)


def turn(run: Run, metrics: Metrics, stop: StopSignals, watchdog: Watchdog, last: int) -> None:
    """One update and what follows it; `last`: the update that ends the run."""
    update(run, metrics, watchdog)
    run.done += 1
    run.preempted = stop.agreed()
    metrics.progress.update()
    with watchdog.doing("saving or drawing"):
        try:
            after_update(run, metrics, last)
        except NotFinite as found:
            roll_back(run, metrics, found)
    watchdog.progressed(run.done)


def update(run: Run, metrics: Metrics, watchdog: Watchdog) -> None:
    """One update of the weights; or only its batches, if it is one to be left out."""
    recipe, now, device = run.recipe, run.done, run.launch.device
    left_out = now in run.skipped
    engine.set_lr(run.engine, schedule.lr_at(recipe, now))
    if run.teacher:
        run.teacher.momentum = schedule.ema_momentum_at(recipe, now)
    alpha = torch.full((), schedule.alpha_at(recipe, now), dtype=torch.float64, device=device)
    number = torch.full((), now, device=device)
    for _ in range(recipe.accum_iter):
        with metrics.waiting_for_data(), watchdog.doing("loading data"):
            batch = next(run.batches)
        if left_out:
            continue
        weights = run.maps.weights(batch) if run.maps else None
        output = run.engine(batch.images, batch.ids, number, alpha, weights)
        run.engine.backward(output.loss)
        run.engine.step()
        metrics.add(now, batch, output)
        run.seen = (batch.images, weights)
    if left_out:
        return
    metrics.updated(now, engine.grad_norm(run.engine))
    if recipe.on_nonfinite == "skip" and not engine.update_applied(run.engine):
        folder = metrics.save_forensics(now)
        metrics.discard(now)
        leave_out(run, metrics, now, folder)
    elif run.online:
        run.online.after_update(now + 1, batch)


def leave_out(run: Run, metrics: Metrics, bad: int, folder: Path) -> None:
    """Count update `bad` (from 0) among those that are left out.

    **Raises:** `UserError` on all ranks if these are too many.
    """
    run.skipped = sorted({*run.skipped, bad})
    if len(run.skipped) > run.recipe.max_nonfinite:
        engine.agree(
            UserError(
                f"{len(run.skipped)} updates were not finite, more than max_nonfinite {run.recipe.max_nonfinite}; look "
                f"at their samples in {folder.parent}, lower --blr, or allow more with --max_nonfinite"
            )
        )
    if run.launch.rank == 0:
        metrics.say(f"warning: update {bad + 1} is left out: its loss or gradient is not finite; see {folder}")


def save_first(run: Run) -> None:
    """Save before the first update, so that there is a checkpoint to go back to; not if there is one. Collective."""
    there = [False]
    if run.launch.rank == 0:
        there[0] = checkpoint.newest_valid(Path(run.recipe.output_dir), lambda line: None) is not None
    dist.broadcast_object_list(there)
    if not there[0]:
        save(run)


def roll_back(run: Run, metrics: Metrics, found: NotFinite) -> None:
    """Go back to the last checkpoint, and leave out the update that was not finite. Collective.

    **Raises:** `found` if the run is to end instead, `UserError` if too many are left out or no checkpoint is sound.
    """
    if run.recipe.on_nonfinite != "rollback":
        raise found
    leave_out(run, metrics, found.first, metrics.forensics(found.first))
    finish_saving(run)
    newest: list[Path | None] = [None]
    if run.launch.rank == 0:
        newest[0] = checkpoint.newest_valid(Path(run.recipe.output_dir), lambda line: print(line, file=sys.stderr))
    dist.broadcast_object_list(newest)
    if newest[0] is None:
        raise found
    load(run, newest[0])
    metrics.rewind(run.done)


def refresh_maps(run: Run, watchdog: Watchdog) -> None:
    """Make the maps of all samples anew, with the model as it is: the student's attention, or the teacher's difficulty,
    standardised per image because float16 is to hold it. Collective."""
    recipe, launch, step = run.recipe, run.launch, run.step
    assert run.maps is not None
    epoch = run.done // recipe.steps_per_epoch

    def compute(images: torch.Tensor) -> torch.Tensor:
        if recipe.teacher_maps:
            difficulty = step.difficulty(images)
            return (difficulty - difficulty.mean(1, keepdim=True)) / difficulty.std(1, keepdim=True).clamp_min(1e-6)
        attention = maps.cls_attention(step.student, step.normalized_patches(images))
        return maps.attention_weights(attention, per_head=recipe.map_per_head)

    with engine.in_agreement():
        loader = build_loader(
            recipe.data_path,
            batch_size=recipe.batch_size,
            image_size=recipe.image_size,
            channels=recipe.channels,
            rank=launch.rank,
            world_size=launch.world_size,
            num_workers=recipe.num_workers,
            train=False,
            whole=True,
            interpolation=recipe.interpolation,
            max_bad_samples=1.0,
        )
    with watchdog.doing("making maps"):
        run.maps.refresh(epoch, loader, compute, launch, lambda: watchdog.progressed(run.done))
    if launch.rank == 0:
        run.maps.prune(checkpoint.oldest_step(Path(recipe.output_dir)) // recipe.steps_per_epoch)


def after_update(run: Run, metrics: Metrics, last: int) -> None:
    """Read the metrics, draw the panel, save: each at its own interval, and all of them at the end."""
    recipe, epoch_length = run.recipe, run.recipe.steps_per_epoch
    ending, epoch_ends = run.done == last, run.done % epoch_length == 0
    epoch = run.done // epoch_length
    saving = ending or run.preempted or (epoch_ends and epoch % recipe.save_every == 0)
    drawing = recipe.panel_every > 0 and (ending or (epoch_ends and epoch % recipe.panel_every == 0))
    probing = epoch_ends and recipe.online_knn_every > 0 and epoch % recipe.online_knn_every == 0
    if run.done % recipe.log_every == 0 or saving or drawing or probing:
        metrics.read(
            run.done,
            run.done / epoch_length,
            run.step.stopwatch.read(),
            lr=schedule.lr_at(recipe, run.done - 1),
            alpha=schedule.alpha_at(recipe, run.done - 1),
            ema_momentum=schedule.ema_momentum_at(recipe, run.done - 1),
            skipped_updates=len(run.skipped),
            bad_samples=run.bad_samples.update(run.loader),
            **agreement(run),
            **probed(run, probing),
        )
    if drawing:
        draw_panel(run, metrics)
    if saving:
        save(run)
        if run.online:
            with metrics.surviving_the_disk(run.done):
                run.online.save(Path(recipe.output_dir), run.done)
    if drawing or saving or probing:
        metrics.restart()


def agreement(run: Run) -> dict[str, float]:
    """How well a fast mode's difficulty agrees with the exact teacher's, if there is one."""
    if not run.recipe.approximates_teacher or run.seen is None:
        return {}
    return {"map_spearman": float(run.step.map_spearman(*run.seen))}


def probed(run: Run, knn: bool) -> dict[str, float]:
    """What the online probe has to say, with a k-NN test if asked for. Collective."""
    if not run.online:
        return {}
    return run.online.read() | (run.online.knn() if knn else {})


def draw_panel(run: Run, metrics: Metrics) -> None:
    """A picture of the fixed images as the run sees them now, by its teacher if it has one. Collective."""
    weights = run.weights()
    if run.launch.rank:
        return
    model = model_of(run.recipe).eval().to(run.launch.device)
    model.load_state_dict(weights.get("teacher", weights["student"]))
    images, info = visualize.fixed_images(run.recipe, PANEL_IMAGES)
    alpha = schedule.alpha_at(run.recipe, run.done - 1)
    path = Path(run.recipe.output_dir) / "panels" / f"step-{run.done:08d}.png"
    if model.video:
        frames = video_pictures.frames(model, run.recipe, info, images[:PANEL_CLIPS], alpha)
        picture = video_pictures.sheet(frames, run.recipe.tubelet_size)
        animation = video_pictures.animation(frames)
        metrics.animation("clips", animation, run.done)
        with metrics.surviving_the_disk(run.done):
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".gif").write_bytes(animation)
    else:
        picture = visualize.panel(model, run.recipe, info, images, alpha, run.step.frozen)
    with metrics.surviving_the_disk(run.done):
        path.parent.mkdir(exist_ok=True)
        visualize.save_png(picture, path)
    metrics.image("panel", picture, run.done)


def prepare_output(run: Run) -> None:
    """Create output_dir and write what the run is: recipe, merged DeepSpeed JSON, versions (rank 0).

    **Raises:** `UserError` if the folder cannot be written or has no space for a checkpoint.
    """
    output_dir = Path(run.recipe.output_dir)
    config = engine.merge_config(run.recipe.deepspeed_config, run.recipe, run.launch.world_size)
    made_with = versions(run.launch.device, run.launch.world_size)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.require_space(output_dir, run.num_parameters)
        save_recipe(run.recipe, output_dir / checkpoint.RECIPE)
        (output_dir / "deepspeed.json").write_text(json.dumps(config, indent=2) + "\n")
        (output_dir / "versions.json").write_text(json.dumps(made_with, indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"output_dir {output_dir} cannot be written ({error.strerror}); choose another --output_dir"
        ) from error


def finish(run: Run) -> None:
    """Export the encoder, write the report and say where everything is (rank 0)."""
    output_dir = Path(run.recipe.output_dir)
    if run.preempted:  # whoever sent the signal may not wait for reports
        folder = checkpoint.checkpoint_path(output_dir, run.done)
        print(
            f"preempted at update {run.done} of {run.recipe.total_steps}; the checkpoint is {folder}: "
            f"run the same command to continue",
            file=sys.stderr,
        )
        return
    model, recipe = checkpoint.load_weights(output_dir)
    info = {"mean": run.loader.info.mean, "std": run.loader.info.std}
    exported = output_dir / export.EXPORTED[model.video]
    export.export_weights(model, recipe, exported, info=info)
    report.write(output_dir)
    bad = (
        f"\n  bad samples  {run.bad_samples.count} were replaced: {run.bad_samples.path}"
        if run.bad_samples.count
        else ""
    )
    print(
        f"finished {run.done} of {recipe.total_steps} updates\n"
        f"  checkpoint   {checkpoint.checkpoint_path(output_dir, run.done)}\n"
        f"  {'model  ' if model.video else 'encoder'}      {exported} ({export.default_form(model)})\n"
        f"  TensorBoard  tensorboard --host 127.0.0.1 --logdir {output_dir / 'tensorboard'}\n"
        f"  report       {output_dir / 'report.md'}{bad}",
        file=sys.stderr,
    )


def pretrain(asked: Recipe, launch: engine.Launch) -> StopSignals:
    """Run what the command line asks for, on all ranks, to its end or to a signal. **Returns:** the signals it got."""
    run = build(asked, launch)
    recipe = run.recipe
    with engine.in_agreement():
        if launch.rank == 0:
            prepare_output(run)
    if launch.rank == 0:
        effective = f"{recipe.global_batch_size} = {recipe.batch_size} x {launch.world_size} x {recipe.accum_iter}"
        if recipe.fast_modes:
            print(
                f"fast modes: {', '.join(recipe.fast_modes)}; {flops.cost_over_mae(recipe):.2f} x MAE's FLOPs",
                file=sys.stderr,
            )
        print(
            f"{recipe.recipe}: lr {recipe.lr:.3e}, global batch {effective}, {recipe.total_steps} updates, "
            f"{launch.device.type}",
            file=sys.stderr,
        )
    dtype = next(run.step.student.parameters()).dtype
    metrics = Metrics(
        Path(recipe.output_dir),
        rank=launch.rank,
        world_size=launch.world_size,
        total_steps=recipe.total_steps,
        first_step=run.done,
        flops_per_sample=flops.step_flops(run.step.student, recipe, run.step.frozen)["total"],
        matmul_rate=measure_matmul_rate(launch.device, dtype),
        device=launch.device,
    )
    try:
        limit = 0.8 * engine.timeout().total_seconds()  # before collectives give up, which name nobody
        watchdog = Watchdog(Path(recipe.output_dir), launch.rank, launch.world_size, timeout=limit)
        with StopSignals() as stop, watchdog:
            with engine.naming_lost_ranks(lambda: f"after update {run.done}"):
                train(run, metrics, stop, watchdog)
                stop.drain()
                finish_last_save(run)
    finally:
        run.saver.close()
        metrics.close()
        run.loader.close()
    if launch.rank == 0:
        finish(run)
    return stop


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm pretrain`, once per rank."""
    asked = parse_arguments(argv)
    with engine.session() as launch:
        stop = pretrain(asked, launch)
        if stop.interrupted:
            raise KeyboardInterrupt


if __name__ == "__main__":
    from fasthpm.cli import run_rank

    run_rank(main)
