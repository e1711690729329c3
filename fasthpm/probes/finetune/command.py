"""Fine-tuning by MAE's or VideoMAE's recipe: all weights of the encoder and a fresh head, on labelled images or videos.

    fasthpm finetune RUN --train_path train.beton --val_path val.beton
    fasthpm finetune RUN --train_path k400_train --val_path k400_val  # a video run, sets by data_prep.videos
    deepspeed --module fasthpm.probes.finetune RUN …  # the same flags; torchrun too
    fasthpm finetune RUN … --from_scratch             # the same network without pretraining
    fasthpm finetune RUN … --evaluate                 # only test what is in the output folder
    fasthpm finetune RUN … --evaluate --test_views 5x3  # videos: mean over 5 clips x 3 crops

The network is timm's ViT, mixup, cutmix and the augmentations are timm's, the engine is DeepSpeed. --preset mae is the
published recipe, for ImageNet and larger images; k400 and ssv2 are VideoMAE's for Kinetics-400 and Something-Something
v2; small is ours, minutes for small images (up to 96 pixels) from a short pretraining: plain crops and flips, 5 epochs
(videos: 12). auto (the default) takes the one that fits, of videos by the run's size and whether it mirrored clips.
Every number can be given. The same command continues where a killed or interrupted one stopped.

RUN/finetune/ receives result.json, result.md, classifier.safetensors (timm), metrics.jsonl and the checkpoints.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fasthpm import checkpoint, files, ranks
from fasthpm.checkpoint import shards
from fasthpm.cli import Arguments, Parser, without_effect
from fasthpm.data.device import on_device
from fasthpm.data.statistics import PixelStatistics, statistics_from
from fasthpm.entry import Result
from fasthpm.errors import UserError, unlike, warn
from fasthpm.model import HPMViT
from fasthpm.options import add_recipe_arguments
from fasthpm.patches import suited
from fasthpm.probes import result
from fasthpm.probes.classifier import architecture
from fasthpm.probes.features import half
from fasthpm.probes.finetune.building import (
    KIND,
    ClassifierStep,
    FineTuning,
    build,
    choose_tokens,
    load_encoder,
    loader_options,
    network,
    thorough_loader,
)
from fasthpm.probes.finetune.settings import (
    BY_DIFFICULTY,
    OF_PRESETS,
    PRESETS,
    FineTune,
    complete,
    image_size_of,
    preset,
    stored,
)
from fasthpm.probes.finetune.testing import test
from fasthpm.ranks import zero
from fasthpm.recipe import Recipe
from fasthpm.run.lock import FolderLock
from fasthpm.run.records import METRICS_FILE, read_metrics
from fasthpm.tuning.loop import carry_out
from fasthpm.tuning.past import check_origin, differences, origin_of
from fasthpm.tuning.testing_again import check_set, counting

CLASSIFIER_FILE = "classifier.safetensors"


@dataclass(frozen=True, repr=False)
class FinetuneResult(Result):
    """What a fine-tuning, or a test of one, has come to."""

    output_dir: Path
    finished: bool  # False: stopped before its last update; the same call continues
    figures: dict[str, float]  # accuracy and accuracy_top5 in percent, val_loss and more; {} unless it is finished
    classifier: Path | None

    @property
    def accuracy(self) -> float:
        """Top-1 in percent, NaN unless it is finished."""
        return self.figures.get("accuracy", math.nan)


# -------------------------------------------------------------------------------------------------- results
def finish(run: FineTuning) -> FinetuneResult:
    """Write classifier and result, say where they are. Collective."""
    weights = zero.full_state(run.layout, "ema" if run.teacher else "master")
    return ranks.by_first(lambda: write_results(run, weights or {}))


def write_results(run: FineTuning, weights: dict[str, Tensor]) -> FinetuneResult:
    """Classifier, result.json and result.md of a finished run (rank 0)."""
    folder = Path(run.settings.output_dir)
    if run.done < run.recipe.total_steps:
        why = "preempted" if run.preempted else "stopped"
        print(
            f"{why} at update {run.done} of {run.recipe.total_steps}; run the same command to continue", file=sys.stderr
        )
        return FinetuneResult(folder, False, {}, None)
    records = [record for record in read_metrics(folder) if record["step"] <= run.done]
    tested = [record for record in records if "accuracy" in record]
    write_classifier(run, weights, folder / CLASSIFIER_FILE)
    if not tested or tested[-1]["step"] != run.done:  # the disk was full
        raise UserError(f"{folder / METRICS_FILE} lacks the last test; make room, and add --evaluate to test again")
    hours = sum(record["seconds"] for record in records) * run.launch.world_size / 3600
    final = {name: tested[-1][name] for name in ("accuracy", "accuracy_top5", "val_loss")}
    best = max(record["accuracy"] for record in tested)
    figures = {**final, "best_accuracy": best, "gpu_hours": round(hours, 4)}
    report(run.settings, run.origin, folder, figures)
    return FinetuneResult(folder, True, figures, folder / CLASSIFIER_FILE)


def write_classifier(run: FineTuning, weights: dict[str, Tensor], path: Path) -> None:
    """timm's ViT as safetensors; the metadata holds what builds it, the classes, mean and std."""
    vit: Any = run.step.vit
    embed = vit.patch_embed
    settings = {
        **json.loads(run.notes[checkpoint.FINETUNE_NOTES])["model"],
        "num_classes": len(run.info.classes),
        "global_pool": run.settings.global_pool,
        "img_size": list(embed.img_size),
    }
    if "num_frames" in settings:  # not trained, and interpolated to img_size
        weights = {**weights, "pos_embed": vit.pos_embed.float().cpu()}
    metadata = {"timm": settings, "classes": run.info.classes, **run.pixels.as_json()}
    tensors = {name.removeprefix("vit."): value.contiguous() for name, value in weights.items()}
    with files.writing(path, "make room and start again"), files.replacing(path) as aside:
        files.save_tensors(tensors, aside, {name: json.dumps(value) for name, value in metadata.items()})


def report(settings: FineTune, origin: dict[str, Any], folder: Path, figures: dict[str, Any]) -> None:
    """Write result.json and result.md, and print the accuracy."""
    name = "from scratch" if settings.from_scratch else "fine-tune"
    tokens = f", {settings.keep_tokens:.0%} {settings.token_policy} tokens" if settings.token_policy else ""
    views = f", {settings.test_views} views" if settings.views != (1, 1) else ""
    made = {
        "protocol": f"{name}, {settings.epochs} epochs{tokens}{views}",
        **figures,
        **origin,
        "settings": dataclasses.asdict(settings),
    }
    row = result.write_result(folder, made)
    print(f"{made['protocol']}: top-1 {figures['accuracy']:.2f} %, top-5 {figures['accuracy_top5']:.2f} %\n{row}")
    print(f"written to {folder / 'result.json'}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------- command
def parse_arguments(argv: Arguments) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(run, preset), and the settings that were given."""
    parser = Parser(prog="fasthpm finetune", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a pretraining run, or one of its checkpoints")
    parser.add_argument("--preset", choices=PRESETS, default="auto", help="see above")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    add_recipe_arguments(parser, FineTune)
    arguments = parser.parse_args(argv)
    known = {field.name for field in dataclasses.fields(FineTune)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    needed = ["val_path"] if given.get("evaluate") else ["train_path", "val_path"]
    for name in needed:
        if not given.get(name):
            raise UserError(f"--{name} is missing; see fasthpm finetune --help")
    if not given.get("evaluate"):
        refuse_idle(given)
    return arguments, given


def refuse_idle(given: dict[str, Any]) -> None:
    """Refuse flags without effect beside the others that were `given`. **Raises:** `UserError`."""
    policy = given.get("token_policy", "")
    if not policy:
        without_effect(["keep_tokens"], "without --token_policy all patches are seen", given)
    if policy not in BY_DIFFICULTY:
        without_effect(
            ["difficulty_run", "token_difficulty"],
            f"only --token_policy {' or '.join(BY_DIFFICULTY)} asks what is hard",
            given,
        )
    if given.get("lr"):
        without_effect(["blr"], "--lr gives the learning rate itself", given)


def main(argv: Arguments = None) -> FinetuneResult:
    """`fasthpm finetune` and `fasthpm.finetune`, once per rank."""
    arguments, given = parse_arguments(argv)
    with ranks.session() as launch:
        if given.get("evaluate"):
            return evaluate_only(arguments, given, launch)
        with FolderLock(launch.rank) as lock:
            return fine_tune(build(arguments, given, launch, lock))


def fine_tune(run: FineTuning) -> FinetuneResult:
    """Train and test what was built, to its end or to a signal. **Raises:** `KeyboardInterrupt` if that was Ctrl-C."""
    plan, way = run.recipe, run.settings.token_difficulty
    tokens = f", {run.settings.token_policy} tokens by difficulty {way}" if way else ""
    effective = f"{plan.global_batch_size} = {plan.batch_size} x {run.launch.world_size} x {plan.accum_iter}"
    interrupted = carry_out(
        run,
        f"lr {plan.lr:.3e}, global batch {effective}, "
        f"{plan.total_steps} updates, {len(run.info.classes)} classes{tokens}",
    )
    found = finish(run)
    if interrupted:
        raise KeyboardInterrupt
    return found


def evaluate_only(arguments: argparse.Namespace, given: dict[str, Any], launch: ranks.Launch) -> FinetuneResult:
    """Test the newest checkpoint of a fine-tuning on `val_path`."""
    with ranks.in_agreement():
        model, recipe = load_encoder(arguments.run, given)
        folder, notes, settings = as_trained(arguments, given, model, recipe)
        image_size = image_size_of(settings, model)
        options = loader_options(settings, recipe, image_size, launch)
        loader = on_device(thorough_loader(settings, options), launch.device)
        if list(loader.info.classes) != notes["classes"]:
            what = unlike(f"the classifier in {folder}", notes["classes"], settings.val_path, loader.info.classes)
            raise UserError(f"{what}; give the data that it was trained for")
        vit = network(model, settings, image_size, len(notes["classes"]))
        saved = shards.SavedState(folder)
        kind: zero.State = "ema" if saved.has("ema") else "master"
        vit.load_state_dict({name.removeprefix("vit."): saved.whole(kind, name) for name in saved.names})
        run = result.provenance(arguments.run, launch)
        check_origin(KIND, folder, run)
        origin = origin_of(KIND, folder, run)
    begin = time.perf_counter()
    begun = statistics_from(notes) or PixelStatistics(tuple(notes["mean"]), tuple(notes["std"]))
    pixels = suited(begun, loader.info, settings.val_path)
    step = ClassifierStep(vit.to(launch.device), choose_tokens(vit, settings, launch.device, pixels=pixels)).eval()
    with half(launch.device):
        figures = test(step, loader, pixels, launch, settings.seed, settings.views)
    loader.close()
    hours = (time.perf_counter() - begin) * launch.world_size / 3600
    figures = {**figures, "gpu_hours": round(hours, 4)}
    folder = Path(settings.output_dir) / "evaluate"
    with ranks.in_agreement():
        if launch.rank == 0:
            report(settings, origin, folder, figures)
    return FinetuneResult(folder, True, figures, None)


def as_trained(
    arguments: argparse.Namespace, given: dict[str, Any], model: HPMViT, recipe: Recipe
) -> tuple[Path, dict[str, Any], FineTune]:
    """The newest checkpoint of the fine-tuning, its notes, and the settings of a test of it.

    **Raises:** `UserError` if there is none, it is of another architecture, or flags say otherwise than it was trained.
    """
    chosen = preset(arguments.preset, model, False, recipe.flip)
    settings = complete(FineTune(**{"test_views": chosen.get("test_views", ""), **given}), arguments.run)
    folder = checkpoint.newest_valid(Path(settings.output_dir), warn)
    if folder is None or not (folder / checkpoint.FINETUNE_NOTES).is_file():
        raise UserError(
            f"{settings.output_dir} holds no fine-tuned classifier; fine-tune first, or give another --output_dir"
        )
    notes = json.loads((folder / checkpoint.FINETUNE_NOTES).read_text())
    if notes["model"] != architecture(model):
        raise UserError(
            f"{folder} is of another architecture than {arguments.run} "
            f"({differences(notes['model'], architecture(model))}); give the run that it came from"
        )
    past, whose = stored(notes["settings"]), f"the classifier in {folder}"
    if "difficulty_run" in given and not Path(past["difficulty_run"]).exists():  # it was moved
        past["difficulty_run"] = given["difficulty_run"]
    counting(FineTune, given, past, whose)
    if arguments.preset != "auto":
        implied = FineTune(**preset(arguments.preset, model, past["from_scratch"], recipe.flip))
        own = {name: getattr(implied, name) for name in sorted(OF_PRESETS - given.keys() - FineTune.TESTS)}
        check_set(f"--preset {arguments.preset}", own, past, whose)
    return folder, notes, dataclasses.replace(settings, **past)
