"""Which flags count beside --evaluate: those of the test and its data. A network is tested as it was trained."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasthpm.errors import UserError, note_once

Settings = Mapping[str, Any]
UNKNOWN = object()  # the stored value of a setting that nobody told


def counting(kind: Any, given: Settings, stored: Settings, whose: str) -> dict[str, Any]:
    """Those of the settings `given` that a test goes by.

    One of the training may be said again, as whoever adds --evaluate to the same command does, but not otherwise than
    it was. What only says how a training runs is noted to have no part here.

    - `kind`: the dataclass of the settings, whose `TESTS` names the fields that count
    - `stored`: those of the training, UNKNOWN where they were never told; `whose`: the network, for messages

    **Raises:** `UserError` for one that says otherwise, and for a checkpoint to resume.
    """
    if given.get("resume", "auto") != "auto":
        raise UserError(
            f"--resume is {given['resume']}, and --evaluate tests the newest checkpoint of output_dir; leave it out"
        )
    for name, value in given.items():
        if name not in kind.TESTS and stored.get(name, value) != value:
            raise UserError(f"--{name} is {value!r}, and {as_trained(whose, stored[name])}")
    only_running = {field.name for field in dataclasses.fields(kind) if field.metadata["run_only"]} - kind.TESTS
    idle = sorted(only_running & given.keys() - {"resume"})
    if idle:
        note_once(f"{', '.join(f'--{name}' for name in idle)}: of a training, without a part in this test")
    return {name: value for name, value in given.items() if name in kind.TESTS or name not in stored}


def check_set(flag: str, implied: Settings, stored: Settings, whose: str) -> None:
    """Refuse a recipe or preset that the network was not trained by.

    - `flag`: with its value, "--recipe x"; `implied`: the settings that it makes; what `stored` lacks does not count

    **Raises:** `UserError` naming the first that differs.
    """
    for name, value in implied.items():
        if name in stored and stored[name] != value:
            raise UserError(f"{flag} has {name} {value!r}, and {as_trained(whose, stored[name])}")


def as_trained(whose: str, value: Any) -> str:
    """The end of a refusal; `value`: what the setting was, or UNKNOWN."""
    was = "" if value is UNKNOWN else f", with {value!r}"
    return f"{whose} is tested as it was trained{was}; leave it out"
