"""A dense task of a few lines: the bright half of an image, by a linear layer."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasthpm import ranks
from fasthpm.cli import run_rank
from fasthpm.data.sampling import Array
from fasthpm.dense.command import main
from fasthpm.dense.loader import Unreadable
from fasthpm.dense.settings import Dense
from fasthpm.dense.task import Task, Tested
from fasthpm.model import HPMViT
from fasthpm.options import option

SIDE = 8


@dataclass(frozen=True, kw_only=True)
class Toy(Dense):
    data_path: str = option("", "toy:N, N images")
    size: int = option(SIDE, "side of the images")


class Halves:
    """Image i is bright on the left (i even) or on the right."""

    classes = ("left", "right")

    def __init__(self, path: str, size: int) -> None:
        self.source, self.size, self.count = path, size, int(path.split(":")[1])

    def __len__(self) -> int:
        return self.count

    def name(self, sample: int) -> str:
        return f"{self.source}/{sample}"

    def repeats(self) -> Array | None:
        return None

    def read(self, sample: int) -> tuple[Array, int]:
        if "bad" in self.source and sample == 3:
            raise Unreadable("is torn")
        image = np.zeros((self.size, self.size, 1), np.uint8)
        half = slice(0, self.size // 2) if sample % 2 == 0 else slice(self.size // 2, None)
        image[:, half] = 200
        return image, sample % 2


def noisy(found: tuple[Array, int], random: np.random.Generator) -> tuple[Array, int]:
    image, label = found
    return np.clip(image + random.integers(0, 50, image.shape), 0, 255).astype(np.uint8), label


def plain(found: tuple[Array, int], random: np.random.Generator) -> tuple[Array, int]:
    return found


def stacked(samples: list[tuple[Array, int]]) -> tuple[Any, Any]:
    images = [torch.from_numpy(image).permute(2, 0, 1) for image, _ in samples]
    return torch.stack(images) if images else torch.zeros(0), torch.tensor([label for _, label in samples])


class Net(nn.Module):
    def __init__(self, model: HPMViT, size: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patch_embed, self.norm = model.patch_embed, nn.BatchNorm1d(size * size)
            self.drop, self.head = nn.Dropout(0.2), nn.Linear(size * size, 2)

    def encoder_name(self, name: str) -> str:
        return name if name.startswith("patch_embed.") else ""

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        rows = self.norm(images.flatten(1).to(self.head.weight.dtype))
        logits = self.head(self.drop(rows)).float()
        if targets is None:
            return logits
        used = sum(weight.float().sum() * 0 for weight in self.patch_embed.parameters())
        return {"sides": nn.functional.cross_entropy(logits, targets) + used, "size": logits.pow(2).mean() * 0.01}


class ToyTask(Task):
    name, what, best, summary, shown, settings = "toy", "toy", "accuracy", "A toy.", ("accuracy",), Toy

    @property
    def recipes(self) -> Mapping[str, Callable[[], Toy]]:  # type: ignore[override]
        small = {"steps": 12, "warmup_steps": 2, "batch_size": 4, "global_batch_size": 8, "lr": 0.05, "num_workers": 1}
        return {"toy_small": lambda: Toy(input_size="8", log_every=2, eval_every=4, save_every=5, **small)}

    def recipe_for(self, model: HPMViT, given: Mapping[str, Any]) -> str:
        return "toy_small"

    def open(self, settings: Toy, split: str, channels: int, values: Any) -> Halves:
        return Halves(settings.data_path if split == "train" else "toy:10", settings.size)

    def files(self, settings: Toy, data: Any) -> Sequence[str]:
        return [__file__] * len(data)

    def transform(self, settings: Toy, split: str, pixels: Any) -> Any:
        return noisy if split == "train" else plain

    def collate(self, settings: Toy) -> Any:
        return stacked

    def network(self, model: HPMViT, settings: Toy, data: Any) -> Net:
        return Net(model, settings.size, settings.seed)

    def test(self, forward: Any, loader: Any, pixels: Any, launch: ranks.Launch) -> Tested:
        sums = torch.zeros(2)
        for batch in loader:
            if not len(batch.ids):
                continue
            hits = forward((batch.images / 255 - pixels.mean[0]) / pixels.std[0]).argmax(1) == batch.targets
            sums += torch.tensor([hits.sum(), len(hits)])
        hits, count = ranks.share(sums, launch.world_size).tolist()
        return Tested(
            {"accuracy": 100 * hits / count}, [{"class": "left", "accuracy": 1.0}, {"class": "right", "accuracy": None}]
        )

    def draw(self, forward: Any, loader: Any, pixels: Any, launch: ranks.Launch, path: Path, show: str) -> None:
        count = sum(len(batch.ids) for batch in loader)
        if launch.rank == 0:
            path.write_text(str(count))


TASK = ToyTask()

if __name__ == "__main__":
    run_rank(functools.partial(main, TASK))
