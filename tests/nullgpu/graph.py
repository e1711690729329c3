"""What updates by CUDA graphs ask of the GPU, beside the same updates as they are written.

    python -m tests.nullgpu.graph '[{"recipe": "debug", "accum_iter": 2}, …]'

Fields beside "recipe" are the recipe's, and "older_torch": torch cannot redirect gradients from then on. Prints a JSON
object with, per case and in order, for each plan of masks that the recipe has: "eager" and "graph", a
`card.Watch.summary` of one update each, but with the peak of memory of those before it, recording included; "problem",
why there is no graph; "teacher_seconds", measured by the graph.
"""

import json
import sys
from typing import Any

import torch

from tests.nullgpu import card
from tests.nullgpu.update import Built


def counted(launch: Any, case: dict[str, Any]) -> list[dict[str, Any]]:
    """One case."""
    from fasthpm.speed import graph

    if case.pop("older_torch", False):
        delattr(torch.autograd.graph, graph.OVERRIDE)
    built = Built(launch, case["recipe"], **{name: value for name, value in case.items() if name != "recipe"})
    graphs: Any = graph.micro_step("on", built.engine, built.step.stopwatch)
    found, maps = [], built.maps
    for built.maps in [None] if maps is None else [None, maps]:
        one: dict[str, Any] = {}
        for name, micro_step, before in (("eager", graph.Eager(built.engine), 1), ("graph", graphs, 3)):
            with card.Watch() as first:
                for number in range(before):
                    built.update(number, micro_step=micro_step)
            built.step.stopwatch.read()
            with card.Watch() as watch:
                built.update(before, micro_step=micro_step)
            one[name] = watch.summary | {"peak": first.peak}
        found.append(one | {"problem": graphs.problem, "teacher_seconds": built.step.stopwatch.read()})
    return found


def main() -> None:
    card.prepare()
    from fasthpm import ranks

    with ranks.session() as launch:
        card.report({"cases": [counted(launch, case) for case in json.loads(sys.argv[1])]})


if __name__ == "__main__":
    main()
