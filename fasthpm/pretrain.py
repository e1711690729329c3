"""Pretraining: parse → build → loop.

    deepspeed --module fasthpm.pretrain --recipe NAME --data_path X.beton --output_dir OUT [flags]
    torchrun --nproc_per_node N -m fasthpm.pretrain …      # same flags
    fasthpm pretrain …                                      # one process

Flags keep MAE's spellings; each overrides one field of the recipe. A run continues by itself from the newest valid
checkpoint in its output_dir.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fasthpm import checkpoint, entry, maps, ranks, recipes, schedule
from fasthpm.checkpoint.saver import Saver
from fasthpm.cli import Arguments, Parser
from fasthpm.commands import attention, shortage
from fasthpm.data import build_loader
from fasthpm.data.device import on_device
from fasthpm.data.identity import identity_of
from fasthpm.data.shown import shown_of
from fasthpm.data.statistics import statistics_of
from fasthpm.dense import online as online_dense
from fasthpm.difficulty import HEAD
from fasthpm.errors import UserError
from fasthpm.exchange import exporting
from fasthpm.frozen import build_frozen, check_photographs
from fasthpm.options import add_recipe_arguments
from fasthpm.patches import model_of
from fasthpm.pictures import report
from fasthpm.pictures.progress import draw_panel
from fasthpm.probes import online as online_probes
from fasthpm.ranks import zero
from fasthpm.ranks.signals import StopSignals
from fasthpm.ranks.watchdog import Watchdog
from fasthpm.recipe import Recipe, build_recipe, science_of
from fasthpm.run.bad_samples import BadSampleLog
from fasthpm.run.difficulty_check import DifficultyCheck
from fasthpm.run.feature_rank import FeatureRank
from fasthpm.run.health import NotFinite
from fasthpm.run.lock import FolderLock
from fasthpm.run.metrics import Metrics, measure_matmul_rate
from fasthpm.run.nonfinite import leave_out, roll_back, save_first
from fasthpm.run.observer import Observer
from fasthpm.run.output import announce, prepare_output
from fasthpm.run.records import read_metrics
from fasthpm.run.refresh import refresh_maps
from fasthpm.run.state import Run, endless, finish_last_save, resume, save
from fasthpm.speed import flops, graph
from fasthpm.step import Step
from fasthpm.teacher import EMATeacher
from fasthpm.views import step_of

COMPILE_SECONDS = 1800.0  # that torch.compile may take on a rank

entry.make_callable(__name__)  # `fasthpm.pretrain(recipe=…, …)` is the command too


@dataclass(frozen=True, repr=False)
class PretrainResult(entry.Result):
    """What a run has come to."""

    output_dir: Path
    updates: int
    finished: bool  # False: a signal ended it first; the same call continues
    checkpoint: Path
    encoder: Path | None  # of videos the whole model; None and no report either unless it is finished
    report: Path | None
    metrics: dict[str, float]  # the last reading


def parse_arguments(argv: Arguments) -> Recipe:
    """The recipe that is asked for. From Python `recipe` may be a `Recipe`.

    **Raises:** `UserError` for anything unknown or out of range.
    """
    base = argv.get("recipe") if isinstance(argv, Mapping) else None
    if isinstance(argv, Mapping) and isinstance(base, Recipe):
        argv = {name: value for name, value in argv.items() if name != "recipe"}
    parser = Parser(prog="fasthpm pretrain", description=__doc__)
    parser.add_argument(
        "--recipe",
        help=f"what to train: {', '.join(recipes.RECIPES)}, or a recipe.json; a run that goes on has its own",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers inject it
    add_recipe_arguments(parser, Recipe)
    try:
        given = vars(parser.parse_args(argv))
        given.pop("local_rank")
        name = given.pop("recipe")
        base = base if isinstance(base, Recipe) else base_of(name, given.get("output_dir", ""))
        if "blr" in given:
            given.setdefault("lr", 0.0)  # a recipe.json has the rate that its own blr gave
        recipe = build_recipe({**dataclasses.asdict(base), **given}, source="command line")
        for name in ("data_path", "output_dir"):
            if not getattr(recipe, name):
                raise UserError(f"--{name} is missing; see fasthpm pretrain --help")
    except UserError as error:
        error.printed_elsewhere = os.environ.get("RANK", "0") != "0"  # every rank reads the same command line
        raise
    return recipe


def base_of(name: str | None, output_dir: str) -> Recipe:
    """What the flags change: the recipe `name`, or without a name that of the run which output_dir holds.

    **Raises:** `UserError` if there is neither: what is trained is not guessed.
    """
    if name:
        return recipes.from_name(name)
    folder = Path(output_dir)
    if output_dir and checkpoint.has_checkpoints(folder) and (folder / checkpoint.RECIPE).is_file():
        return dataclasses.replace(recipes.from_name(str(folder / checkpoint.RECIPE)), resume="auto", stop_after=0)
    raise UserError(
        "--recipe is missing: it says what is trained, for example --recipe hpm_vit_base_in1k_200e for photographs, "
        "--recipe hpm_demo for small images; fasthpm recipes lists them all"
    )


def build(recipe: Recipe, launch: ranks.Launch, lock: FolderLock | None = None) -> Run[Step]:
    """Loader, DeepSpeed engine and teacher of a resolved run, at its first update or at its checkpoint.

    - `lock`: what keeps other runs out of output_dir, once all is well
    """
    with ranks.in_agreement():
        recipe = checkpoint.continued(recipe, launch.world_size)
        accum_iter = recipe.accumulation(launch.world_size)
        options = recipe.loader_options(rank=launch.rank, world_size=launch.world_size, accum_iter=accum_iter)
        loader = build_loader(recipe.data_path, options)
        recipe, data = recipe.resolve(loader.info.num_samples, launch.world_size), identity_of(recipe.data_path)
        checkpoint.compare_recipes(recipe, science_of, data)
        config = ranks.merge_config(recipe.deepspeed_config, recipe, launch.world_size)
        online_probes.check(recipe, loader.info, config)
        online_dense.check(recipe, config, loader.info.values)
        shown_of(loader.info.values, loader.info.channels, recipe.show)  # its errors, before any work
        student = checkpoint.initial_model(recipe)
        check_photographs(recipe, loader.info, recipe.data_path)
        frozen = build_frozen(recipe, launch.device)
    if lock:
        lock.take(Path(recipe.output_dir))
        with ranks.in_agreement():  # another run may have ended there since
            checkpoint.compare_recipes(recipe, science_of, data)
    map_store = maps.for_recipe(recipe, loader.info)
    loader = on_device(maps.with_maps(loader, map_store), launch.device)
    step = step_of(student, recipe, loader.info)
    with graph.recordable(launch.device):
        deepspeed_engine = ranks.build_engine(step, recipe, config, launch)
    if frozen:
        step.attach_frozen(frozen)
    teacher = None
    if recipe.uses_teacher:
        momentum = schedule.ema_momentum_at(recipe, 0)
        teacher = EMATeacher(deepspeed_engine, step.student, "student.", model_of(recipe), momentum, HEAD)
        step.attach_teacher(teacher.module)
    saver = Saver(launch.rank, launch.world_size, timeout=ranks.timeout().total_seconds())
    run = Run(
        recipe, launch, loader, deepspeed_engine, step, teacher, zero.MasterLayout(deepspeed_engine), saver, map_store
    )
    run.notes |= checkpoint.pixels_note(statistics_of(loader.info))
    run.batches, run.data = endless(loader), data
    run.micro_step = graph.micro_step(recipe.cuda_graph, deepspeed_engine, step.stopwatch)
    run.attention = attention.settle(recipe, launch.device, next(student.parameters()).dtype)
    resume(run)
    run.observers = observers(run)
    run.bad_samples = BadSampleLog(
        Path(recipe.output_dir), recipe.data_path, recipe.max_bad_samples, rank=launch.rank, keep=run.done > 0
    )
    return run


def observers(run: Run[Step]) -> list[Observer]:
    """What the recipe wants to watch the run, with the state of the run that goes on."""
    recipe, found = run.recipe, list[Observer]()
    if recipe.difficulty_every and recipe.answers_difficulty:
        found.append(DifficultyCheck(run))
    if recipe.rankme_every:
        found.append(FeatureRank(run))
    if recipe.online_probe_every or recipe.online_knn_every:
        with ranks.in_agreement():
            probe = online_probes.OnlineProbe(recipe, run.step, run.loader.info, run.launch)
            probe.load(Path(recipe.output_dir), run.done)
        found.append(probe)
    if recipe.dense_path:
        with ranks.in_agreement():
            found.append(online_dense.OnlineDenseProbe(recipe, run.step, run.launch, run.loader.info.values))
    return found


def train(run: Run[Step], metrics: Metrics, stop: StopSignals, watchdog: Watchdog) -> None:
    """The loop: batch, step, log, save; until the last update, or the one at which the ranks agree to stop."""
    recipe = run.recipe
    last = min(recipe.total_steps, recipe.stop_after or recipe.total_steps)
    if recipe.on_nonfinite == "rollback":
        save_first(run)
    while run.done < last and not run.preempted:
        if run.maps and run.maps.due_at(run.done, recipe.steps_per_epoch):
            refresh_maps(run, watchdog)
        turn(run, metrics, stop, watchdog, last)


def turn(run: Run[Step], metrics: Metrics, stop: StopSignals, watchdog: Watchdog, last: int) -> None:
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


def update(run: Run[Step], metrics: Metrics, watchdog: Watchdog) -> None:
    """One update of the weights; or only its batches, if it is one to be left out."""
    recipe, now, device = run.recipe, run.done, run.launch.device
    left_out = now in run.skipped
    set_rates(run)
    if run.teacher:
        run.teacher.momentum = schedule.ema_momentum_at(recipe, now)
    alpha = torch.full((), schedule.alpha_at(recipe, now), dtype=torch.float64, device=device)
    number = torch.full((), now, device=device)
    for _ in range(recipe.accum_iter):
        with metrics.waiting_for_data(), watchdog.doing("loading data"):
            batch = next(run.batches)
        if left_out:
            continue
        scores = run.maps.scores(batch) if run.maps else None
        with contextlib.nullcontext() if run.step.compiled else watchdog.doing("compiling", COMPILE_SECONDS):
            local = (batch.local,) if recipe.local_crops else ()
            output = run.micro_step(batch.images, batch.ids, number, alpha, scores, *local)
        metrics.add(now, batch, output)
        run.seen = (batch.images, scores)
    if left_out:
        return
    metrics.updated(now, ranks.grad_norm(run.engine))
    applied = recipe.on_nonfinite != "skip" or ranks.update_applied(run.engine)
    run.step.end_update(applied)
    if not applied:
        folder = metrics.save_forensics(now)
        metrics.discard(now)
        leave_out(run, metrics, now, folder)
        return
    for observer in run.observers:
        observer.after_update(now + 1, batch)


def set_rates(run: Run[Step]) -> None:
    """What the schedules say of the update that comes."""
    recipe, now = run.recipe, run.done
    if recipe.freeze_last_layer_epochs:
        ranks.freeze_last_layer(run.engine, schedule.last_layer_is_frozen(recipe, now))
    ranks.set_lr(run.engine, schedule.lr_at(recipe, now))
    if recipe.weight_decay_end >= 0:
        ranks.set_weight_decay(run.engine, schedule.weight_decay_at(recipe, now))


def after_update(run: Run[Step], metrics: Metrics, last: int) -> None:
    """Read the metrics, draw the panel, save: each at its own interval, and all of them at the end."""
    recipe, epoch_length = run.recipe, run.recipe.steps_per_epoch
    ending, epoch_ends = run.done == last, run.done % epoch_length == 0
    epoch = run.done // epoch_length
    saving = ending or run.preempted or (epoch_ends and epoch % recipe.save_every == 0)
    drawing = recipe.panel_every > 0 and (ending or (epoch_ends and epoch % recipe.panel_every == 0))
    probing = any(observer.due(run.done) for observer in run.observers)
    if run.done % recipe.log_every == 0 or saving or drawing or probing:
        with metrics.paused():
            observed = {name: value for observer in run.observers for name, value in observer.read(run.done).items()}
        metrics.read(
            run.done,
            run.done / epoch_length,
            run.step.stopwatch.read(),
            lr=schedule.lr_at(recipe, run.done - 1),
            alpha=schedule.alpha_at(recipe, run.done - 1),
            ema_momentum=schedule.ema_momentum_at(recipe, run.done - 1),
            **schedule.more_rates(recipe, run.done - 1),
            skipped_updates=len(run.skipped),
            bad_samples=run.bad_samples.update(run.loader),
            **map_agreement(run),
            **observed,
        )
    if drawing:
        draw_panel(run, metrics)
    if saving:
        save(run)
        for observer in run.observers:
            with metrics.surviving_the_disk(run.done, "an observer's state"):
                observer.save(Path(recipe.output_dir), run.done)
    if drawing or saving or probing:
        metrics.restart()


def map_agreement(run: Run[Step]) -> dict[str, float]:
    """How well a fast mode's difficulty agrees with the exact teacher's, if there is one."""
    if not run.recipe.approximates_teacher or run.seen is None:
        return {}
    return {"map_spearman": float(run.step.map_spearman(*run.seen))}


def finish(run: Run[Step]) -> PretrainResult:
    """Export the encoder, write the report and say where everything is (rank 0)."""
    output_dir = Path(run.recipe.output_dir)
    folder, metrics = checkpoint.checkpoint_path(output_dir, run.done), {}
    with contextlib.suppress(UserError):  # a full disk may have kept none
        metrics = read_metrics(output_dir)[-1]
    if run.preempted:  # whoever sent the signal may not wait for reports
        print(
            f"preempted at update {run.done} of {run.recipe.total_steps}; the checkpoint is {folder}: "
            f"run the same command to continue",
            file=sys.stderr,
        )
        return PretrainResult(output_dir, run.done, False, folder, None, None, metrics)
    model, recipe = checkpoint.load_weights(output_dir)
    whole = exporting.is_kept_whole(model)
    exported = output_dir / exporting.EXPORTED[whole]
    exporting.export_weights(model, recipe, exported, info=statistics_of(run.loader.info).as_json())
    report.write(output_dir)
    bad = (
        f"\n  bad samples  {run.bad_samples.count} were replaced: {run.bad_samples.path}"
        if run.bad_samples.count
        else ""
    )
    print(
        f"finished {run.done} of {recipe.total_steps} updates\n"
        f"  checkpoint   {folder}\n"
        f"  {'model  ' if whole else 'encoder'}      {exported} ({exporting.default_form(model)})\n"
        f"  TensorBoard  tensorboard --host 127.0.0.1 --logdir {output_dir / 'tensorboard'}\n"
        f"  report       {output_dir / 'report.md'}{bad}",
        file=sys.stderr,
    )
    return PretrainResult(output_dir, run.done, True, folder, exported, output_dir / "report.md", metrics)


def pretrain(asked: Recipe, launch: ranks.Launch) -> PretrainResult:
    """Run `asked`, on all ranks, to its end or to a signal. **Raises:** `KeyboardInterrupt` if that was Ctrl-C."""
    with FolderLock(launch.rank) as lock:
        with shortage.explained(asked, launch, lambda: "before the first update"):
            run = build(asked, launch, lock)
        return pursue(run)


def pursue(run: Run[Step]) -> PretrainResult:
    """Train what was built, to its end or to a signal. **Raises:** `KeyboardInterrupt` if that was Ctrl-C."""
    recipe, launch = run.recipe, run.launch
    with ranks.in_agreement():
        if launch.rank == 0:
            prepare_output(run)
            announce(run)
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
        shown=run.step.telling(),
    )
    metrics.are_of(run.step.names, recipe.global_crops)
    try:
        limit = 0.8 * ranks.timeout().total_seconds()  # before collectives give up, which name nobody
        watchdog = Watchdog(Path(recipe.output_dir), launch.rank, launch.world_size, timeout=limit)
        with StopSignals() as stop, watchdog:
            with ranks.naming_lost_ranks(run.reached), shortage.explained(recipe, launch, run.reached):
                train(run, metrics, stop, watchdog)
                stop.drain()
                finish_last_save(run, alive=lambda: watchdog.progressed(run.done))
    finally:
        run.saver.close()
        metrics.close()
        run.loader.close()
    result = ranks.by_first(lambda: finish(run))
    if stop.interrupted:
        raise KeyboardInterrupt
    return result


def main(argv: Arguments = None) -> PretrainResult:
    """`fasthpm pretrain` and `fasthpm.pretrain`, once per rank."""
    asked = parse_arguments(argv)
    with ranks.session() as launch:
        return pretrain(asked, launch)


if __name__ == "__main__":
    from fasthpm.cli import run_rank

    run_rank(main)
