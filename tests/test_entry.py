"""The Python entry: the commands' checks, the same runs, and a process that stays usable whatever happens."""

import argparse
import dataclasses
import importlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import fasthpm
from fasthpm import entry, recipes
from fasthpm.__main__ import dispatch
from fasthpm.cli import Parser
from fasthpm.errors import UserError
from fasthpm.exchange import exporting
from tests.helpers.launch import PLACE, ROOT, check_ranks
from tests.helpers.runs import run_with_random_weights

PICO = "hpm_vit_pico_patch4_28"
SHORT = {
    "recipe": "debug", "model": PICO, "data_path": "synthetic:32", "epochs": 1, "warmup_epochs": 0, "panel_every": 0
}  # fmt: skip


def no_session() -> bool:
    """Whether nothing of a session is left."""
    return not dist.is_initialized() and not any(name in os.environ for name in PLACE)


def words(flags: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


# -------------------------------------------------------------------------------------------------- keywords
def parser() -> Parser:
    parser = Parser(prog="program")
    parser.add_argument("run", type=Path)
    parser.add_argument("-k", "--ks", type=int, nargs="+", default=[1])
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--name", default="default")
    parser.add_argument("--kind", choices=("one", "two"), default="one")
    parser.add_argument("--switch", action="store_true")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--hidden", help=argparse.SUPPRESS)
    return parser


@pytest.mark.parametrize(
    ("keywords", "line"),
    [
        ({}, ""),
        ({"ks": (3, 4)}, "--ks 3 4"),
        ({"ks": [3]}, "-k 3"),
        ({"ks": 3}, "-k 3"),
        ({"lr": 0.1 + 0.2}, "--lr 0.30000000000000004"),
        ({"lr": -1e-9, "name": "-x"}, "--lr=-1e-9 --name=-x"),
        ({"name": Path("a") / "b c"}, "--name 'a/b c'"),
        ({"name": ""}, "--name ''"),
        ({"name": None, "lr": None}, ""),
        ({"switch": True, "flip": False}, "--switch --no-flip"),
        ({"switch": False, "flip": True, "kind": "two"}, "--flip --kind two"),
    ],
)
def test_keywords_are_a_command_line(keywords: dict[str, Any], line: str) -> None:
    assert parser().parse_args({**keywords, "run": "here"}) == parser().parse_args(["here", *shlex.split(line)])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"nam": "x"}, "unknown argument 'nam'; did you mean 'name'?; program --help lists them all"),
        ({"hidden": "x"}, "unknown argument 'hidden'; program --help lists them all"),
        ({"help": True}, "unknown argument 'help'; did you mean 'flip'?; program --help lists them all"),
        ({"lr": "fast"}, "argument --lr: invalid float value: 'fast'; see program --help"),
        ({"ks": [1.5]}, "argument -k/--ks: invalid int value: '1.5'; see program --help"),
        ({"kind": "on"}, "argument --kind: invalid choice: 'on' (choose from 'one', 'two'); see program --help"),
        ({"flip": 1}, "flip is 1, expected True or False"),
        ({"switch": "yes"}, "switch is 'yes', expected True or False"),
        ({"name": ["a", "b"]}, "name is ['a', 'b'], expected one value"),
        ({"run": None}, "the following arguments are required: run; see program --help"),
    ],
)
def test_wrong_keywords_are_refused_as_flags_are(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parser().parse_args({"run": "here", **keywords})
    assert str(caught.value).replace("choose from one, two", "choose from 'one', 'two'") == message


@pytest.mark.parametrize("command", entry.FUNCTIONS)
def test_every_function_names_the_nearest_flag(command: str) -> None:
    function = getattr(fasthpm, command)
    with pytest.raises(
        UserError, match=r"unknown argument '(weigths'; did you mean 'weights|epoch'; did you mean 'epochs)'"
    ):
        function(**({"epoch": 1} if command == "pretrain" else {"run": "x", "weigths": "student"}))
    assert no_session()


def test_wrong_values_are_the_command_lines_errors(tmp_path: Path) -> None:
    for flags in ({"recipe": "hpm_dmo"}, {"mask_ratio": 2.0}, {"mask_policy": "hmp"}, {"data_path": "synthetic:4"}):
        given = {**SHORT, **flags, "output_dir": tmp_path}
        with pytest.raises(UserError) as ours:
            fasthpm.pretrain(**given)
        assert no_session()
        with pytest.raises(UserError) as theirs:
            dispatch(["pretrain", *words(given)])
        assert str(ours.value) == str(theirs.value)
        assert "\n" not in str(ours.value)


# -------------------------------------------------------------------------------------------------- runs
def test_two_calls_are_two_commands(tmp_path: Path) -> None:
    """Twice in one process, from a `Recipe` and from the command line: the same run."""
    recipe = dataclasses.replace(recipes.debug(), model=PICO, epochs=1, warmup_epochs=0.0, panel_every=0)
    made = fasthpm.pretrain(recipe=recipe, data_path="synthetic:32", output_dir=tmp_path / "a", flip=False)
    assert no_session()
    dispatch(["pretrain", *words({**SHORT, "output_dir": tmp_path / "b"}), "--no-flip"])
    ours, theirs = (load_file(tmp_path / name / "encoder.safetensors") for name in "ab")
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    assert (made.finished, made.updates, made.output_dir) == (True, 4, tmp_path / "a")
    assert made.encoder == tmp_path / "a" / "encoder.safetensors"
    assert made.checkpoint.is_dir()
    assert made.report is not None
    assert made.report.is_file()
    assert made.metrics["step"] == 4
    assert 0 < made.metrics["loss"] < 10
    assert repr(made).startswith(f"PretrainResult\n  output_dir: {tmp_path / 'a'}\n  updates: 4\n  finished: True\n")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.updates = 5


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_the_process_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Once: the run saves and stops; twice: it stops at once. The same call then finishes it."""
    pretrain = importlib.import_module("fasthpm.pretrain")
    update = pretrain.update

    def interrupted(run: Any, *rest: Any) -> None:
        update(run, *rest)
        for _ in range(times if run.done == 0 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    flags = {**SHORT, "data_path": "synthetic:48", "output_dir": tmp_path}
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, "update", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fasthpm.pretrain(**flags)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert no_session()
    assert any((tmp_path / "checkpoints").glob("step-*")) == (times == 1)
    made = fasthpm.pretrain(**flags)
    assert (made.finished, made.updates) == (True, 6)


PROGRAM = """
import sys
from pathlib import Path
import fasthpm, torch.distributed as dist

flags = {"data_path": "synthetic:32", "output_dir": sys.argv[1] + "/run", "epochs": 1, "panel_every": 0}
flags["model"] = "hpm_vit_pico_patch4_28"
try:
    fasthpm.pretrain(recipe="debug", **{**flags, "data_path": "synthetic:4"})
except fasthpm.UserError as error:
    said = [str(error)]
made = fasthpm.pretrain(recipe="debug", **flags, warmup_epochs=0)
assert made.encoder.is_file() and made.report.is_file()
found = fasthpm.knn(made.output_dir, train_path="synthetic:40", val_path="synthetic:20")
assert found.files[0].is_file() and not dist.is_initialized()
said += [repr(made), repr(found)]
Path(sys.argv[1], f"rank{__import__('os').environ['RANK']}").write_text("\\n".join(said))
"""


def test_all_ranks_get_the_result(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    check_ranks(tmp_path / "program.py", tmp_path, launcher="forked")
    said = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("synthetic:4 has 4 samples, fewer than one global batch of 16")


def test_exports_and_maps_return_what_they_wrote(tmp_path: Path) -> None:
    run = run_with_random_weights(tmp_path / "run", dataclasses.replace(recipes.debug(), data_path="synthetic:32"))
    exported = fasthpm.export(run, output=tmp_path / "encoder.safetensors")
    assert exported.path.is_file()
    assert exported.difference <= exporting.TOLERANCE
    assert exported.usage in repr(exported).replace("\\'", "'")
    maps = fasthpm.maps(run, data_path="synthetic:5", output=tmp_path / "maps", true_loss=1, overlays=0)
    assert maps.images == 5
    assert maps.maps.is_file()
    assert maps.ranking.is_file()
    assert maps.saliency == {}


def test_a_session_of_someone_elses_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match=r"torch\.distributed is in use in this process"):
            fasthpm.pretrain(**SHORT, output_dir=tmp_path)
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------------------------- modules
def test_modules_are_functions_too() -> None:
    for name in entry.MODULES:
        module = importlib.import_module(f"fasthpm.{name}")
        assert isinstance(module, ModuleType)
        assert getattr(fasthpm, name) is module
        assert callable(module)
    from fasthpm import maps, pretrain

    assert callable(pretrain.main)
    assert "attention" in maps.KINDS
    with pytest.raises(AttributeError, match="has no attribute 'knm'"):
        fasthpm.knm  # noqa: B018
    assert set(entry.FUNCTIONS) <= set(dir(fasthpm))


def test_importing_is_cheap() -> None:
    """What trains, decodes and draws is imported when it is needed; whichever way the modules come in."""
    program = (
        "import sys, fasthpm\n"
        "heavy = {'deepspeed', 'ffcv', 'nvidia.dali', 'numba', 'tensorboard', 'matplotlib', 'fasthpm.pretrain'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "fasthpm.knn, fasthpm.export\n"
        "assert not heavy & set(sys.modules)\n"
        "import fasthpm.maps\n"
        "assert callable(fasthpm.maps) and 'fasthpm.pictures' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
