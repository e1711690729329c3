"""`fasthpm pretrain` on "cuda": data, loop, observers, checkpoints, export and report are the real ones.

    python -m tests.nullgpu.command '[["--recipe", "debug", "--data_path", "synthetic:64", …], …]'

One run after the other, each with its arguments. Prints one JSON object: of every run what each of its updates asked of
the GPU (a `card.Watch.summary`), everything between two batches included, and what it came to.
"""

import json
import sys
from typing import Any

from tests.nullgpu import card


def watch(found: list[dict[str, Any]]) -> None:
    """Put what every update of the training loop asks of the GPU into `found`."""
    from fasthpm import pretrain

    real = pretrain.turn

    def turn(run: Any, *rest: Any) -> None:
        with card.Watch() as seen:
            real(run, *rest)
        compiled = {
            part.name: part.failure for part in (run.step.run_teacher, run.step.run_student) if is_compiled(part)
        }
        found.append(seen.summary | {"device": run.launch.device.type, "compiled": compiled})

    pretrain.turn = turn


def is_compiled(part: Any) -> bool:
    from fasthpm.speed.compiled import Compiled

    return isinstance(part, Compiled)


def main() -> None:
    card.prepare()
    from fasthpm import pretrain

    runs, updates = [], list[dict[str, Any]]()
    watch(updates)
    for arguments in json.loads(sys.argv[1]):
        updates.clear()
        result = pretrain.main(arguments)
        runs.append({"updates": list(updates), "done": result.updates, "finished": result.finished})
    card.report({"runs": runs})


if __name__ == "__main__":
    main()
