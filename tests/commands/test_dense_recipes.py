"""Recipes of segmentation and detection in `fasthpm recipes`."""

import re

import pytest

from fasthpm.__main__ import dispatch
from fasthpm.commands.dense_recipes import DENSE
from fasthpm.dense.settings import Dense
from fasthpm.errors import UserError

PUBLISHED = [
    *(f"upernet_vit_{size}_ade20k_{steps}" for size in ("base", "large") for steps in ("80k", "160k")),
    *(f"maskrcnn_vit_base_{name}" for name in ("coco_12e", "coco_100e", "lvis")),
]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    dispatch(["recipes", *arguments])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_ones_say_the_papers_numbers_and_that_they_have_not_been_run(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    line = next(line for line in shown(capsys) if line.startswith(f"{name} "))
    cells = re.split(r"  +", line)
    assert len(cells) == 4, line
    assert re.search(r"\d\d\.\d|not at hand", cells[2])
    assert cells[3] == "not yet run"


@pytest.mark.parametrize("name", list(DENSE))
def test_each_is_shown_with_its_command_and_the_origin_of_its_numbers(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert isinstance(DENSE[name].make(), Dense)
    lines = shown(capsys, name)
    assert f"fasthpm {DENSE[name].command} RUN --recipe {name} --data_path DATA" in lines
    rows = {line.split()[0]: line.split(maxsplit=2)[2] for line in lines if re.match(r"\w+ +\S+ {2,}\w", line)}
    assert rows["num_workers"] == "how it is run, not what"
    assert {"lr", "steps", "layer_decay"} <= rows.keys()
    assert all(re.match(r"paper|released code|ours|set by|how it is run|from", row) for row in rows.values()), rows


def test_the_short_schedule_says_that_its_learning_rate_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(shown(capsys, "maskrcnn_vit_base_coco_12e"))
    assert re.search(r"\[ours\] lr 4e-5", text)


def test_two_of_one_command_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "upernet_vit_base_ade20k_80k", "--diff", "upernet_vit_base_ade20k_160k")
    assert [line.split() for line in lines[1:]] == [["steps", "80000", "160000"]]


@pytest.mark.parametrize("other", ["maskrcnn_small", "hpm_demo"])
def test_two_of_different_commands_are_not(other: str) -> None:
    with pytest.raises(UserError, match="compare two of one"):
        dispatch(["recipes", "upernet_small", "--diff", other])
