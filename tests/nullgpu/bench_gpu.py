"""`bench.gpu` on "cuda", from start to end, with the smallest sizes.

    python -m tests.nullgpu.bench_gpu OUT [PART …]

Prints one JSON object: each part's state and error. `correctness` finds garbage wrong.
"""

import contextlib
import json
import sys
from pathlib import Path

from tests.nullgpu import card


def main() -> None:
    card.prepare()
    import torch

    from bench import gpu

    torch.backends.cudnn.enabled = False  # eager baselines convolve

    out, parts = sys.argv[1], sys.argv[2:]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
        gpu.main([out, "--rehearse", *(["--parts", *parts] if parts else [])])
    found = json.loads((Path(out) / gpu.RESULTS).read_text())["parts"]
    card.report({name: [part["state"], part.get("error", "")] for name, part in found.items()})


if __name__ == "__main__":
    main()
