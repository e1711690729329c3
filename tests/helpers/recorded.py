"""`fasthpm.pretrain` that notes which samples every update sees: `python recorded.py NOTES flags…`.

A line of NOTES/PID.jsonl: update (from 0), sample ids, and a checksum of each sample's pixels as the step gets them.
"""

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

from torch import Tensor

from fasthpm import pretrain
from fasthpm.cli import run_rank
from fasthpm.step import Step, StepOutput

forward = Step.forward


def main(argv: Any = None) -> None:
    path = Path(sys.argv.pop(1)) / f"{os.getpid()}.jsonl"

    def noting(self: Step, images: Tensor, ids: Tensor, step: Tensor, *rest: Any) -> StepOutput:
        checksums = [zlib.crc32(image.contiguous().numpy().tobytes()) for image in images]
        with path.open("a") as file:
            file.write(json.dumps([int(step), ids.tolist(), checksums]) + "\n")
        return forward(self, images, ids, step, *rest)

    Step.forward = noting  # type: ignore[method-assign]
    pretrain.main()


if __name__ == "__main__":
    run_rank(main)
