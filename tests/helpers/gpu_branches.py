"""What the program does on GPUs only, on a CPU: `python gpu_branches.py pretrain …` is `fasthpm pretrain …` with it.

Masks by torch instead of numpy, large blocks of pairs, fused attention in bfloat16, batches asked for one ahead, and
the update without waits, its rates on the device and its gradients added at once; no graphs (speed/test_graph.py has).
Nothing here is a GPU: what differs between devices (rounding, streams) is not seen.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from fasthpm import layers, loss, mask_loops, ranks
from fasthpm.data.device import DeviceLoader
from fasthpm.ranks.engine import keep_rates_on
from fasthpm.ranks.zero import add_gradients_at_once, update_without_waits


@contextmanager
def gpu_branches() -> Iterator[None]:
    """While entered, the step and `fasthpm pretrain` take a GPU's branches."""
    build = ranks.build_engine
    pretrain = importlib.import_module("fasthpm.pretrain")  # forked ranks import it anew

    def build_engine(*arguments: Any) -> Any:
        engine = build(*arguments)
        assert update_without_waits(engine)
        keep_rates_on(engine, engine.device)
        add_gradients_at_once(engine)
        return engine

    with ExitStack() as stack:
        for module in (mask_loops, layers, loss):
            stack.enter_context(patch.object(module, "on_cpu", lambda values: False))
        stack.enter_context(patch.object(pretrain, "on_device", DeviceLoader))
        stack.enter_context(patch.object(ranks, "build_engine", build_engine))
        yield


if __name__ == "__main__":
    from fasthpm.__main__ import main

    with gpu_branches():
        sys.exit(main())
