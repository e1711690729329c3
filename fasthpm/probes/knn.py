"""k-NN probe: DINO's weighted vote of the nearest training features, no training at all.

    fasthpm knn RUN --train_path train.beton --val_path val.beton [--weights student teacher untrained]
    torchrun --nproc_per_node 8 -m fasthpm knn RUN …     # features and queries are split over the ranks

Protocol (DINO): features L2-normalised, votes exp(similarity / 0.07), k in {10, 20, 100, 200}; images resized and
centre-cropped (224/256 of the short side, or whole where the set is stored at the model's size). Of a video, the clip
in its middle.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fasthpm import ranks
from fasthpm.checkpoint.weights import load_weights, run_of, saved_files
from fasthpm.cli import Arguments, Parser
from fasthpm.data import DatasetInfo, build_loader, read_info
from fasthpm.data.device import on_device
from fasthpm.data.names import stored_in
from fasthpm.entry import Result
from fasthpm.errors import UserError
from fasthpm.files import check_place
from fasthpm.model import HPMViT
from fasthpm.probes import result
from fasthpm.probes.clips import add_sampling_rate, at_rate
from fasthpm.probes.features import Features, features, first, gather_rows, pool_of
from fasthpm.recipe import Recipe

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07
CHUNK = 1024  # queries compared with the bank at a time: bounds memory to CHUNK x bank similarities


@dataclass(frozen=True, repr=False)
class KnnResult(Result):
    """Top-1 accuracies in percent; `accuracy` and `k` are the best of the first weights and bank size asked for."""

    accuracy: float
    k: int
    accuracies: dict[tuple[str, int], dict[int, float]]  # of (weights, bank size): of k
    files: tuple[Path, ...]  # JSON, one for each (weights, bank size)


def vote(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, num_classes: int, neighbours: Sequence[int] = NEIGHBOURS
) -> dict[int, Tensor]:
    """Predicted classes int64 [Q] for every k in `neighbours` that the bank can serve (DINO's weighted vote).

    - `bank`: [N, D], `queries`: [Q, D], both L2-normalised; `bank_labels`: int64 [N]
    """
    largest = min(max(neighbours), len(bank))
    chosen: dict[int, list[Tensor]] = {k: [] for k in neighbours if k <= largest} or {largest: []}
    for chunk in queries.split(CHUNK):
        similarity, index = (chunk @ bank.T).topk(largest, dim=1)
        weight, label = (similarity / TEMPERATURE).exp(), bank_labels[index]
        for k, predictions in chosen.items():
            votes = weight.new_zeros(len(chunk), num_classes).scatter_add_(1, label[:, :k], weight[:, :k])
            predictions.append(votes.argmax(dim=1))
    return {k: torch.cat(parts) if parts else bank_labels.new_zeros(0) for k, parts in chosen.items()}


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    num_classes: int,
    world_size: int = 1,
    neighbours: Sequence[int] = NEIGHBOURS,
) -> dict[int, float]:
    """Top-1 accuracy in percent for every k, over the queries of all ranks."""
    predictions = vote(bank, bank_labels, queries, num_classes, neighbours)
    hits = torch.tensor(
        [[float((p == labels).sum()), float(len(labels))] for p in predictions.values()],
        dtype=torch.float64,
        device=queries.device,
    )
    if world_size > 1:
        dist.all_reduce(hits)
    return {k: 100 * float(right / total) for k, (right, total) in zip(predictions, hits, strict=True)}


def evaluate(arguments: argparse.Namespace, weights: str, launch: ranks.Launch) -> dict[int, dict[int, float]]:
    """Accuracy per k of the model with these `weights` for every bank size, all ranks together."""
    sizes = arguments.bank_size
    with ranks.in_agreement():
        sets = [(path, read_info(path)) for path in (arguments.train_path, arguments.val_path)]
        result.check_sets(*sets)
        _check_voters(arguments, sets[0][1].num_samples)
        model, recipe = load_weights(arguments.run, weights)
        recipe = at_rate(recipe, arguments.sampling_rate)
        model = model.to(launch.device)
        arguments.pool = pool_of(model, arguments.pool)
        largest = 0 if 0 in sizes else max(sizes)
        bank, info = _side(arguments, arguments.train_path, model, recipe, launch, largest)
        queries, val_info = _side(arguments, arguments.val_path, model, recipe, launch)
        result.check_sets((arguments.train_path, info), (arguments.val_path, val_info))
        result.check_labels(queries.labels, arguments.val_path, len(info.classes), several=False)
    bank = Features(*(gather_rows(column, launch.world_size) for column in bank))
    with ranks.in_agreement():
        result.check_labels(bank.labels, arguments.train_path, len(info.classes))
    results = {}
    for size in sizes:
        rows, labels, _ = first(bank, size)
        results[size] = knn_accuracy(
            rows, labels, queries.rows, queries.labels, len(info.classes), launch.world_size, arguments.k
        )
    return results


def _check_voters(arguments: argparse.Namespace, num_samples: int) -> None:
    """A bank, or a k that was asked for, of more than there are is an error; the usual k are left out then."""
    if (largest := max(arguments.bank_size)) > num_samples:
        raise UserError(
            f"bank_size is {largest}, more than the {num_samples} training images of {arguments.train_path}; use 0 for "
            f"all, or a smaller --bank_size"
        )
    smallest = min(size or num_samples for size in arguments.bank_size)
    for k in arguments.k if arguments.k_given else ():
        if k > smallest:
            raise UserError(
                f"k is {k}, more than the {smallest} training images that vote; use a smaller --k, or more images"
            )


def _side(
    arguments: argparse.Namespace, path: str, model: HPMViT, recipe: Recipe, launch: ranks.Launch, limit: int = 0
) -> tuple[Features, DatasetInfo]:
    """Features of this rank's share of one data set, and what its sidecar says."""
    options = recipe.loader_options(
        batch_size=arguments.batch_size,
        rank=launch.rank,
        world_size=launch.world_size,
        num_workers=arguments.num_workers,
        train=False,
    )
    loader = on_device(build_loader(path, options), launch.device)
    try:
        quiet = launch.rank != 0
        return features(
            model, recipe, loader, arguments.pool, launch.device, limit, launch.world_size, quiet
        ), loader.info
    finally:
        loader.close()


def parse_arguments(argv: Arguments) -> argparse.Namespace:
    """What is asked for. **Raises:** `UserError` for values out of range."""
    parser = Parser(prog="fasthpm knn", description=__doc__)
    parser.add_argument("run", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument("--train_path", required=True, help="prepared set whose labels vote")
    parser.add_argument("--val_path", required=True, help="prepared set that is classified")
    parser.add_argument(
        "--weights",
        choices=("student", "teacher", "untrained"),
        nargs="+",
        default=["student"],
        help="which encoder; several give several results",
    )
    parser.add_argument(
        "--pool", choices=("cls", "mean"), default="", help="cls token (default), or mean of the patches (of videos)"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images per device and forward")
    parser.add_argument(
        "--bank_size",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="only the first N training images vote; 0 = all; several sizes give several results",
    )
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        metavar="K",
        help="how many neighbours vote (default: 10 20 100 200, as many as fit)",
    )
    parser.add_argument("--num_workers", type=int, default=0, help="decoding threads; 0 = cores / ranks")
    add_sampling_rate(parser)
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=None,
        help="JSON result (default: RUN/knn_WEIGHTS_POOL[_N][_CHECKPOINT].json)",
    )
    arguments = parser.parse_args(argv)
    count = len(arguments.bank_size) * len(arguments.weights)
    if arguments.output and count > 1:
        raise UserError(f"--output {arguments.output} names one file for {count} results; leave it out")
    if arguments.output:
        paths = (arguments.train_path, arguments.val_path)
        sources = [place for path in paths for place in stored_in(path, arguments.output)]
        check_place(arguments.output, "output", endings=(".json",), sources=[*sources, *saved_files(arguments.run)])
    arguments.k_given, arguments.k = bool(arguments.k), arguments.k or list(NEIGHBOURS)
    if min(arguments.k) < 1:
        raise UserError(f"k is {min(arguments.k)}, expected 1 or more")
    if arguments.batch_size < 1 or min(arguments.bank_size) < 0:
        raise UserError(
            f"batch_size is {arguments.batch_size}, expected 1 or more; bank_size is {min(arguments.bank_size)}, "
            f"expected 0 or more"
        )
    return arguments


def main(argv: Arguments = None) -> KnnResult:
    """`fasthpm knn` and `fasthpm.knn`, once per rank."""
    arguments = parse_arguments(argv)
    accuracies: dict[tuple[str, int], dict[int, float]] = {}
    with ranks.session() as launch:
        with ranks.in_agreement():  # before the work: it fails where the checkpoint is not whole
            origin = result.provenance(arguments.run, launch) if launch.rank == 0 else {}
        for weights in arguments.weights:
            begin = time.perf_counter()
            results = evaluate(arguments, weights, launch)
            accuracies |= {(weights, size): accuracy for size, accuracy in results.items()}
            with ranks.in_agreement():
                if launch.rank == 0:
                    for size, accuracy in results.items():
                        _report(arguments, weights, size, accuracy, time.perf_counter() - begin, origin)
    first_of_all = next(iter(accuracies.values()))
    best = best_of(first_of_all)
    return KnnResult(first_of_all[best], best, accuracies, tuple(_file(arguments, *key) for key in accuracies))


def best_of(accuracy: dict[int, float]) -> int:
    """The k with the highest accuracy; of equals the first."""
    return max(accuracy, key=lambda k: accuracy[k])


def _file(arguments: argparse.Namespace, weights: str, size: int) -> Path:
    run, name = run_of(arguments.run), f"knn_{weights}_{arguments.pool}{f'_{size}' if size else ''}"
    if run != arguments.run:  # of several checkpoints, beside each other
        name += f"_{arguments.run.resolve().name}"
    return arguments.output or run / f"{name}.json"


def _report(
    arguments: argparse.Namespace,
    weights: str,
    size: int,
    accuracy: dict[int, float],
    seconds: float,
    origin: dict[str, Any],
) -> None:
    path = _file(arguments, weights, size)
    if weights == "untrained":
        origin = {**origin, "effective_epochs": 0, "pretraining_gpu_hours": 0}
    made = {
        "protocol": "DINO weighted k-NN, temperature 0.07",
        "weights": weights,
        "pool": arguments.pool,
        "train_path": arguments.train_path,
        "val_path": arguments.val_path,
        "bank_size": size,
        "accuracy": {str(k): round(value, 3) for k, value in accuracy.items()},
        "seconds": round(seconds, 1),
        "gpu_hours": round(seconds * origin["versions"]["world_size"] / 3600, 4),
        **origin,
    }
    result.write_text(path, json.dumps(made, indent=2) + "\n")
    best = best_of(accuracy)
    table = "  ".join(f"k={k}: {value:.2f}" for k, value in accuracy.items())
    who = f"{weights}, {arguments.pool}, {size or 'all'} voters"
    print(f"k-NN top-1 ({who}): {table}  best {accuracy[best]:.2f} % at k={best}")
    print(f"written to {path}", file=sys.stderr)
