"""Reading what a run has written about itself."""

import json
from pathlib import Path

from fasthpm.errors import UserError


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl, one per update number (a resumed run overwrites what it repeats), in order.

    **Raises:** `UserError` if there is none.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the output_dir of a run that has logged something")
    records = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a killed run may leave its last line unfinished
            continue
        records[record["step"]] = record
    if not records:
        raise UserError(f"{path} is empty; expected at least one record")
    return [records[step] for step in sorted(records)]
