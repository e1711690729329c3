"""Linear probe: a linear classifier on the frozen encoder's features, by either published protocol.

    fasthpm linear RUN --train_path train.beton --val_path val.beton [--protocol moco|mae] [--cache_features]
    torchrun --nproc_per_node 8 -m fasthpm linear RUN …     # images are split over the ranks

Both train BatchNorm without weights followed by a linear layer, with random crops and flips and nothing else:
  mae   LARS (for its very large batch: slow on small sets), momentum 0.9, no weight decay,
        blr 0.1 x batch 16384 / 256, 90 epochs, 10 of warm-up, cosine
  moco  SGD, momentum 0.9, no weight decay, blr 0.1 x batch 1024 / 256 (MoCo v3's default; its commands for ViTs, whose
        features it does not normalise, say 3), 100 epochs as in HPM's paper, cosine
--cache_features computes the features of the central crops once and trains on them: no augmentation, minutes instead
of days, and usually a little lower. A killed or interrupted probe goes on with the same command.
Of a video run: on clips, random in training and from the middle in tests, mirrored only where pretraining did.

RUN/linear_PROTOCOL/ receives result.json, result.md and head.safetensors.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from fasthpm import files, ranks
from fasthpm.checkpoint.weights import checkpoint_of, load_weights, run_of
from fasthpm.cli import Arguments, Parser, without_effect
from fasthpm.data import Loader, build_loader, read_info
from fasthpm.data.device import on_device
from fasthpm.data.identity import identity_of as data_of
from fasthpm.data.sampling import sample_order
from fasthpm.data.statistics import PixelStatistics, statistics_of
from fasthpm.entry import Result
from fasthpm.errors import UserError, unlike
from fasthpm.options import Range
from fasthpm.patches import statistics_for
from fasthpm.probes import result
from fasthpm.probes.clips import add_sampling_rate, at_rate
from fasthpm.probes.features import PooledEncoder, pool_of
from fasthpm.probes.head import LinearHead, build_optimizer, lr_at
from fasthpm.probes.linear_protocols import PROTOCOLS, accumulation, fit_batch, updates_of
from fasthpm.ranks.signals import StopSignals
from fasthpm.recipe import Recipe
from fasthpm.run.lock import FolderLock

HEAD = "head.safetensors"
LIMITS = {
    **dict.fromkeys(("epochs", "batch_size", "eval_every", "save_every"), Range(low=1)),
    **dict.fromkeys(("warmup_epochs", "blr", "lr", "global_batch_size", "num_workers"), Range(low=0)),
    "stop_after_epoch": Range(low=0),
    "crop_min": Range(above=0, high=1),
}


@dataclass(frozen=True, repr=False)
class LinearResult(Result):
    """Accuracies in percent, NaN unless the probe is finished; it continues with the same call."""

    output_dir: Path
    epochs: int
    finished: bool
    accuracy: float
    accuracy_top5: float
    head: Path


# -------------------------------------------------------------------------------------------------- features


class CachedBatches:
    """Batches of features that are in memory already, in the order that a loader of this seed would take."""

    def __init__(self, rows: Tensor, labels: Tensor, batch: int, seed: int, launch: ranks.Launch) -> None:
        self.rows, self.labels, self.batch, self.seed, self.launch = rows, labels, batch, seed, launch

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of every full global batch of an epoch."""
        order = torch.from_numpy(sample_order(self.seed, number, len(self.rows))).to(self.rows.device)
        total = self.batch * self.launch.world_size
        for start in range(0, len(order) // total * total, total):
            begin = start + self.launch.rank * self.batch
            ids = order[begin : begin + self.batch]
            yield self.rows[ids], self.labels[ids]


class LoadedBatches:
    """Batches of features of freshly augmented images."""

    def __init__(self, encoder: PooledEncoder, loader: Loader) -> None:
        self.encoder, self.loader = encoder, loader

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the batches of an epoch."""
        self.loader.set_epoch(number)
        for batch in self.loader:
            yield self.encoder(batch.images), batch.labels.to(self.encoder.device)


# -------------------------------------------------------------------------------------------------- the probe
@dataclass
class Probe:
    """A linear probe between two updates."""

    arguments: argparse.Namespace
    launch: ranks.Launch
    head: LinearHead
    optimizer: torch.optim.Optimizer
    train: CachedBatches | LoadedBatches
    loaders: list[Loader]
    val: Loader
    encoder: PooledEncoder
    cached_val: tuple[Tensor, Tensor] | None
    accum_iter: int
    steps_per_epoch: int
    identity: dict[str, Any]  # what a saved head must agree on
    origin: dict[str, Any]
    epoch: int = 0  # whole epochs done
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.arguments.output_dir)


def open_data(
    arguments: argparse.Namespace, recipe: Recipe, video: bool, launch: ranks.Launch, accum_iter: int
) -> tuple[Loader, Loader]:
    """This rank's shares of the set that the head learns from, augmented unless features are cached, and of the other.

    `video`: whether the samples are clips, which are flipped only if pretraining flipped them.
    """
    options = recipe.loader_options(
        batch_size=arguments.batch_size,
        rank=launch.rank,
        world_size=launch.world_size,
        num_workers=arguments.num_workers,
        train=False,
    )
    augmented = dataclasses.replace(
        options,
        train=True,
        seed=arguments.seed,
        crop_min=arguments.crop_min,
        accum_iter=accum_iter,
        crop="random_resized",
        flip=recipe.flip or not video,
    )
    train = build_loader(arguments.train_path, options if arguments.cache_features else augmented)
    return on_device(train, launch.device), on_device(build_loader(arguments.val_path, options), launch.device)


def build(arguments: argparse.Namespace, launch: ranks.Launch, lock: FolderLock | None = None) -> Probe:
    """Encoder, data and head, new or as the last interrupted command left them; `lock`: of output_dir."""
    with ranks.in_agreement():
        model, recipe = load_weights(arguments.run, arguments.weights)
        recipe = at_rate(recipe, arguments.sampling_rate)
        arguments.pool = pool_of(model, arguments.pool)
        fit_batch(arguments, read_info(arguments.train_path).num_samples, launch.world_size)
        accum_iter = accumulation(arguments, launch.world_size)
        train, val = open_data(arguments, recipe, model.video, launch, accum_iter)
        result.check_sets((arguments.train_path, train.info), (arguments.val_path, val.info))
        steps = updates_of(arguments, train.info.num_samples)
        origin = result.provenance(arguments.run, launch)
    if lock:
        lock.take(Path(arguments.output_dir))
    encoder = PooledEncoder(model, recipe, train, arguments.pool, launch.device)
    batches: CachedBatches | LoadedBatches = LoadedBatches(encoder, train)
    cached_val = None
    if arguments.cache_features:
        batches = cached_batches(arguments, encoder, train, launch)
        cached_val = encoder.whole(val, launch.world_size, launch.rank != 0)
    dim = model.embed_dim
    head = LinearHead(dim, len(train.info.classes), arguments.seed).to(launch.device)
    probe = Probe(
        arguments,
        launch,
        head,
        build_optimizer(head, arguments.protocol),
        batches,
        [train, val],
        val,
        encoder,
        cached_val,
        accum_iter,
        steps,
        identity_of(arguments, dim, train.info.classes, statistics_for(model, train.info, train.source)),
        origin,
    )
    with ranks.in_agreement():
        resume(probe)
    return probe


def cached_batches(
    arguments: argparse.Namespace, encoder: PooledEncoder, train: Loader, launch: ranks.Launch
) -> CachedBatches:
    """Batches of the training set's features, computed once. Collective."""
    rows, labels = encoder.whole(train, launch.world_size, launch.rank != 0)
    with ranks.in_agreement():
        result.check_labels(labels, arguments.train_path, len(train.info.classes))
    return CachedBatches(rows, labels, arguments.batch_size, arguments.seed, launch)


def identity_of(
    arguments: argparse.Namespace, dim: int, classes: Sequence[str], pixels: PixelStatistics
) -> dict[str, Any]:
    """What must be the same for a probe to go on where another stopped."""
    names = (
        *("protocol", "weights", "pool", "epochs", "warmup_epochs", "lr", "global_batch_size"),
        *("cache_features", "crop_min", "seed", "train_path"),
    )
    manifest = checkpoint_of(arguments.run) / "manifest.json"
    encoder = files.file_hash(manifest) if manifest.is_file() else str(arguments.run)
    return {
        **{name: getattr(arguments, name) for name in names},
        "data": data_of(arguments.train_path),
        "encoder": encoder,
        "dim": dim,
        "classes": list(classes),
        "pixels": pixels.as_json(),
        "sampling_rate": arguments.sampling_rate,
    }


def train_epoch(probe: Probe, progress: Any, stop: StopSignals) -> bool:
    """One epoch; False if the ranks agreed to stop in its middle."""
    arguments, world_size = probe.arguments, probe.launch.world_size
    probe.head.train()
    for micro_step, (rows, labels) in enumerate(probe.train.epoch(probe.epoch)):
        update = micro_step // probe.accum_iter
        loss = F.cross_entropy(probe.head(rows), labels) / (probe.accum_iter * world_size)
        loss.backward()
        if (micro_step + 1) % probe.accum_iter:
            continue
        if world_size > 1:
            for parameter in probe.head.parameters():
                dist.all_reduce(cast(Tensor, parameter.grad))
        when = probe.epoch + update / probe.steps_per_epoch
        for group in probe.optimizer.param_groups:
            group["lr"] = lr_at(when, arguments.lr, arguments.warmup_epochs, arguments.epochs)
        probe.optimizer.step()
        probe.optimizer.zero_grad()
        progress.update()
        if stop.agreed():
            return False
    probe.epoch += 1
    return True


@torch.no_grad()
def evaluate(probe: Probe) -> dict[str, float]:
    """{"accuracy", "accuracy_top5"} in percent over the test set. Collective."""
    probe.head.eval()
    hits = torch.zeros(3, dtype=torch.int64, device=probe.launch.device)
    for rows, labels in _test_rows(probe):
        if len(rows):
            logits = probe.head(rows)
            counts = [result.count_hits(logits, labels, k) for k in (1, 5)]
            hits += torch.stack([*counts, torch.full_like(counts[0], len(rows))])
    top1, top5, total = ranks.share(hits, probe.launch.world_size)
    return {"accuracy": result.top_accuracy(top1, total), "accuracy_top5": result.top_accuracy(top5, total)}


def _test_rows(probe: Probe) -> Iterator[tuple[Tensor, Tensor]]:
    if probe.cached_val:
        rows, labels = (column[probe.launch.rank :: probe.launch.world_size] for column in probe.cached_val)
        yield rows, labels
        return
    for batch in tqdm(probe.val, desc="test", disable=probe.launch.rank != 0, leave=False):
        yield probe.encoder(batch.images), batch.labels.to(probe.launch.device)


# -------------------------------------------------------------------------------------------------- files
def save(probe: Probe) -> None:
    """Write head, momentum and position (rank 0): aside, then renamed."""
    if probe.launch.rank:
        return
    tensors = {f"head.{name}": value for name, value in probe.head.state_dict().items()}
    for name, parameter in probe.head.named_parameters():
        if "momentum_buffer" in probe.optimizer.state.get(parameter, {}):
            tensors[f"momentum.{name}"] = probe.optimizer.state[parameter]["momentum_buffer"]
    metadata = {"identity": probe.identity, "epoch": probe.epoch, "seconds": probe.seconds}
    path = probe.folder / HEAD
    with files.writing(path, "choose another --output_dir"):
        probe.folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as aside:
            cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            files.save_tensors(cpu, aside, {name: json.dumps(value) for name, value in metadata.items()})


def resume(probe: Probe) -> None:
    """Continue a saved head, if there is one.

    **Raises:** `UserError` for a file of another probe, or none that this program wrote.
    """
    path = probe.folder / HEAD
    if not path.is_file():
        return
    try:
        with safe_open(path, "pt", device=str(probe.launch.device)) as file:
            saved = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        theirs = saved["identity"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no linear probe's head ({error!r}); remove it, or --output_dir another") from error
    if "data" not in theirs:  # from before it was kept
        theirs["data"] = probe.identity["data"]
    elif theirs["data"] == probe.identity["data"]:  # under another path it is no other data
        theirs["train_path"] = probe.identity["train_path"]
    theirs.setdefault("sampling_rate", 0)
    theirs.setdefault("pixels", statistics_of(probe.loaders[0].info).as_json())  # older heads' were always these
    for name, ours in probe.identity.items():
        if theirs.get(name) != ours:
            what = f"is a head with {name} {str(theirs.get(name))[:20]}, this probe has {str(ours)[:20]}"
            if name == "classes":
                what = unlike("is a head that", theirs[name], "the data", ours)
            raise UserError(f"{path} {what}; choose another --output_dir, or remove it")
    probe.head.load_state_dict({n.removeprefix("head."): v for n, v in tensors.items() if n.startswith("head.")})
    for name, parameter in probe.head.named_parameters():
        if f"momentum.{name}" in tensors:
            probe.optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"]
    probe.epoch, probe.seconds = saved["epoch"], saved["seconds"]
    if probe.launch.rank == 0:
        print(f"resuming from {path} after epoch {probe.epoch} of {probe.arguments.epochs}", file=sys.stderr)


def run(probe: Probe) -> LinearResult:
    """Train, test and save epoch by epoch, to the end or to a signal. Collective.

    **Raises:** `KeyboardInterrupt` if that was Ctrl-C.
    """
    arguments, launch = probe.arguments, probe.launch
    total = arguments.epochs * probe.steps_per_epoch
    figures: dict[str, float] = {}
    start, title = probe.epoch * probe.steps_per_epoch, f"linear, {arguments.protocol}"
    progress = tqdm(total=total, initial=start, desc=title, unit="step", disable=launch.rank != 0, mininterval=1.0)
    with StopSignals() as stop, progress:
        last = min(arguments.epochs, arguments.stop_after_epoch or arguments.epochs)
        while probe.epoch < last:
            begin = time.perf_counter()
            finished = train_epoch(probe, progress, stop)
            probe.seconds += time.perf_counter() - begin
            if not finished:
                break
            if probe.epoch == last or probe.epoch % arguments.save_every == 0:
                with ranks.in_agreement():
                    save(probe)
            if probe.epoch % arguments.eval_every == 0:
                figures = evaluate(probe)
                progress.set_postfix(top1=f"{figures['accuracy']:.2f}")
        stop.drain()
    if probe.epoch < arguments.epochs:
        if launch.rank == 0:
            print(
                f"stopped after epoch {probe.epoch} of {arguments.epochs}; run the same command to continue",
                file=sys.stderr,
            )
        if stop.interrupted:
            raise KeyboardInterrupt
        return result_of(probe, {})
    figures = evaluate(probe)
    with ranks.in_agreement():
        report(probe, figures)
    return result_of(probe, figures)


def result_of(probe: Probe, figures: dict[str, float]) -> LinearResult:
    """What the probe has come to; no `figures`: it isn't finished."""
    top1, top5 = (figures.get(name, math.nan) for name in ("accuracy", "accuracy_top5"))
    return LinearResult(probe.folder, probe.epoch, bool(figures), top1, top5, probe.folder / HEAD)


def report(probe: Probe, figures: dict[str, float]) -> None:
    """Write result.json and result.md, and print the accuracy (rank 0)."""
    if probe.launch.rank:
        return
    arguments = probe.arguments
    features = "cached features" if arguments.cache_features else "augmented"
    made = {
        "protocol": f"linear ({arguments.protocol}), {arguments.epochs} epochs, {features}",
        **figures,
        **probe.origin,
        "gpu_hours": round(probe.seconds * probe.launch.world_size / 3600, 4),
        "val_path": arguments.val_path,
        "settings": {name: value for name, value in probe.identity.items() if name != "classes"},
    }
    row = result.write_result(probe.folder, made)
    print(f"{made['protocol']}: top-1 {figures['accuracy']:.2f} %, top-5 {figures['accuracy_top5']:.2f} %\n{row}")
    print(f"written to {probe.folder / 'result.json'}", file=sys.stderr)


# -------------------------------------------------------------------------------------------------- command
def parse_arguments(argv: Arguments) -> argparse.Namespace:
    """The command line, the protocol's numbers filled in."""
    parser = Parser(prog="fasthpm linear", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--train_path", required=True, help="prepared set that the head learns from")
    parser.add_argument("--val_path", required=True, help="prepared set that it is tested on")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), default="moco", help="see above (default: moco)")
    parser.add_argument("--cache_features", action="store_true", help="train on features of central crops; see above")
    parser.add_argument("--weights", choices=("student", "teacher", "untrained"), default="student", help="encoder")
    parser.add_argument(
        "--pool", choices=("cls", "mean"), default="", help="cls token (default), or mean of the patches (of videos)"
    )
    parser.add_argument("--output_dir", default="", help="default: RUN/linear_PROTOCOL")
    parser.add_argument("--epochs", type=int, help="default: the protocol's")
    parser.add_argument("--warmup_epochs", type=float, help="default: the protocol's")
    parser.add_argument("--blr", type=float, help="base learning rate, x global batch / 256; default: the protocol's")
    parser.add_argument("--lr", type=float, default=0.0, help="absolute learning rate; 0 = from blr")
    parser.add_argument("--global_batch_size", type=int, help="default: the protocol's, less for smaller sets")
    parser.add_argument("--batch_size", type=int, default=256, help="images per device and micro-step")
    parser.add_argument("--crop_min", type=float, default=0.08, help="smallest share of the area of a random crop")
    parser.add_argument("--seed", type=int, default=0, help="of the head, the order and the crops")
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads; 0 = cores / ranks")
    parser.add_argument("--eval_every", type=int, default=10, help="epochs between two tests")
    parser.add_argument("--save_every", type=int, default=1, help="epochs between two saves")
    parser.add_argument("--stop_after_epoch", type=int, default=0, help="stop after this epoch; 0 = never")
    add_sampling_rate(parser)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name, value in PROTOCOLS[arguments.protocol].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, min(value, arguments.epochs / 10) if name == "warmup_epochs" else value)
            if name == "global_batch_size":
                arguments.global_batch_size = 0
    arguments.output_dir = arguments.output_dir or str(run_of(arguments.run) / f"linear_{arguments.protocol}")
    for name, limits in LIMITS.items():
        if getattr(arguments, name) not in limits:
            raise UserError(f"{name} is {getattr(arguments, name)}, expected {limits}")
    if arguments.cache_features:
        without_effect(["crop_min"], "--cache_features takes the features of central crops")
    if arguments.lr:
        without_effect(["blr"], "--lr gives the learning rate itself")
    return arguments


def main(argv: Arguments = None) -> LinearResult:
    """`fasthpm linear` and `fasthpm.linear`, once per rank."""
    arguments = parse_arguments(argv)
    with ranks.session() as launch, FolderLock(launch.rank) as lock:
        probe = build(arguments, launch, lock)
        try:
            return run(probe)
        finally:
            for loader in probe.loaders:
                loader.close()
