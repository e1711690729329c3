"""Where the numbers of the published implementations lie, and MAE's schedules among them."""

import json
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
SCHEDULES = next(
    case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"] if case["name"] == "mae_schedules"
)
