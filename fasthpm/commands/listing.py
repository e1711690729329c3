"""What recipes there are, what one of them sets and where each number comes from, and how two differ.

    fasthpm recipes                       # all, one line each
    fasthpm recipes NAME                  # its command, its description, what a step costs, all fields
    fasthpm recipes NAME --diff OTHER     # the fields in which two differ
    fasthpm recipes --markdown            # all of it as a page: docs/recipes.md

NAME and OTHER are recipes, or recipe.json files of runs. Descriptions say where numbers come from in parts that
begin with [paper], [released code] or [ours].
"""

import dataclasses
import inspect
import re
from collections.abc import Sequence

from fasthpm import recipes
from fasthpm.cli import Parser
from fasthpm.commands import costs, dense_recipes
from fasthpm.commands.dense_recipes import DENSE
from fasthpm.difficulty import DIFFICULTIES
from fasthpm.errors import UserError
from fasthpm.options import OURS, PAPER, RELEASED
from fasthpm.recipe import Recipe, science_of
from fasthpm.recipes import FAST_REFRESH_EPOCHS

FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a recipe's docstring says of it."""

    what: str  # its first sentence
    paper: str  # the paper's numbers, or empty
    ours: str  # our numbers or "not yet run", or empty
    text: str  # all of it


def entry(name: str) -> Entry:
    """The description of a published recipe; empty for others (a recipe.json of a run that has none)."""
    function = recipes.RECIPES.get(name)
    text = DENSE[name].text if name in DENSE else inspect.getdoc(function) if function else ""
    line = " ".join((text or "").split())
    return Entry(_sentence(line), _after("Paper", line), _after("[Oo]urs", line), text or "")


def _sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    return re.split(r"\.(?:\s|$)", text, maxsplit=1)[0]


def _after(label: str, text: str) -> str:
    """The sentence after `label` (which may have a remark in brackets) and a colon."""
    found = re.search(rf"\b{label}(?: \([^)]*\))?: (.*)", text)
    return _sentence(found[1]) if found else ""


def listing() -> list[str]:
    """One line per recipe: name, what it is, the paper's number, ours."""
    rows = [("recipe", "what", "paper", "ours")]
    for name in (*recipes.RECIPES, *DENSE):
        about = entry(name)
        rows.append((name, about.what, about.paper, about.ours))
    return _aligned(rows)


def show(name: str) -> list[str]:
    """Command, description and cost of one recipe, and all fields, each with its value and where that comes from."""
    if name in DENSE:
        text, command, rows = dense_recipes.show(name, tag)
        return [name, "", *text.splitlines(), "", command, "", *_aligned([("field", "value", "from"), *rows])]
    recipe = recipes.from_name(name)
    about = entry(recipe.recipe)
    command = f"deepspeed --module fasthpm.pretrain --recipe {name} --data_path X.beton --output_dir OUT"
    head = [name, "", *about.text.splitlines(), ""]
    if command.split(" --data_path")[0] not in about.text:
        head += [command, ""]
    rows = [(f.name, _text(getattr(recipe, f.name)), origin(recipe, f.name)) for f in dataclasses.fields(Recipe)[1:]]
    return [*head, *cost(recipe), "", *_aligned([("field", "value", "from"), *rows])]


def cost(recipe: Recipe) -> list[str]:
    """What a step costs, and what it would cost with other ways to ask what is hard, if the recipe asks."""
    asked = "By how the teacher is asked, FLOPs over MAE's (MB of memory traffic per sample):"
    table = [asked, "", *_aligned(costs.table(recipe))] if recipe.masks_by_difficulty else []
    return [costs.sentence(recipe), *truth(recipe), *table]


def truth(recipe: Recipe) -> list[str]:
    """A line on how true the difficulty is likely to be that the recipe's masks follow, if they do."""
    way = recipe.question
    if not recipe.masks_by_difficulty or not way.likely:
        return []
    better = [f"--difficulty {other.name} {other.likely}" for other in DIFFICULTIES.values() if other.name != way.name]
    others = f"; {', '.join(better)}" if way.name == "paper" else ""
    return [f"difficulty {way.name}: difficulty_spearman is likely to be {way.likely}{others} (1 = true)."]


def origin(recipe: Recipe, field: str) -> str:
    """Where the value of a field comes from: paper, released code, ours, or what this recipe sets by itself."""
    if getattr(recipe, field) != getattr(Recipe(), field):
        return tag(entry(recipe.recipe).text, field) or "set by this recipe"
    if field not in science_of(recipe):
        return "how it is run, not what"
    return FIELDS[field].metadata["origin"] or OURS


def tag(text: str, field: str) -> str:
    """The part of a description, [paper], [released code] or [ours], that mentions a field; empty if none does.

    Only names of several words are looked for, with underscores or without: others are ordinary words, too.
    """
    parts = re.split(rf"\[({PAPER}|{RELEASED}|{OURS})\]", " ".join(text.split()))
    names = (field, field.replace("_", " ")) if "_" in field else ()
    found = [origin for origin, part in zip(parts[1::2], parts[2::2], strict=True) if any(n in part for n in names)]
    return found[0] if found else ""


def difference(name: str, other: str) -> list[str]:
    """The fields in which two recipes differ, a line each, the first recipe's value first."""
    if name in DENSE or other in DENSE:
        found = dense_recipes.difference(name, other)
        return _aligned([("field", name, other), *found]) if found else [f"{name} and {other} differ in no field"]
    one, two = recipes.from_name(name), recipes.from_name(other)
    fields = [field.name for field in dataclasses.fields(Recipe) if field.name != "recipe"]
    rows = [(f, _text(getattr(one, f)), _text(getattr(two, f))) for f in fields if getattr(one, f) != getattr(two, f)]
    return _aligned([("field", name, other), *rows]) if rows else [f"{name} and {other} differ in no field"]


PAGE_HEAD = """# Recipes

*Made by `fasthpm recipes --markdown > docs/recipes.md` from the recipes' docstrings; a test compares the two.*

A recipe is a function in `fasthpm/recipes/` that returns every number of *what* is trained; DeepSpeed's JSON says
*how*. Those of `fasthpm segment` and `fasthpm detect` stand in `fasthpm/dense/`. `fasthpm recipes NAME` prints one
with the origin of every field, `--diff` compares two, and any flag overrides a field. The papers' figures are top-1
accuracies on the validation set, of segmentation mIoU and of detection AP. **None of the published runs has been run
with this code**: the last column says so, and will be filled by results with their machine, never by expectations.
"""
PAGE_COSTS = f"""## What it costs to ask what is hard

FLOPs of a step over those of MAE with the same encoder, decoder and mask ratio, and in brackets MB of memory traffic
per sample beside the matrix products, both by arithmetic (`fasthpm recipes NAME` has them for any recipe). The teacher
is asked in every step; the same with cross-attention decoders; for maps that are kept, which are of images and renewed
every {FAST_REFRESH_EPOCHS} epochs; both. "no loss predictor": `--predict_loss none`. [Ways to ask](method.md).
"""
PAGE_FLAGS = """## Every flag of pretraining

Each is a field of `Recipe`; "base" is its value where a recipe doesn't set it. The last column says where the base
value comes from: the paper, its released code (with what the other one has), or ours.
"""


def markdown() -> str:
    """The page of all recipes and flags, docs/recipes.md."""
    table = ["| recipe | what | paper | ours |", "|---|---|---|---|"]
    for name in (*recipes.RECIPES, *DENSE):
        about = entry(name)
        cells = (f"[`{name}`](#{name})", *(_one_cell(text) for text in (about.what, about.paper, about.ours)))
        table.append(f"| {' | '.join(cells)} |")
    sections = [line for name in recipes.RECIPES for line in _section(name)]
    sections += [line for name in DENSE for line in _dense_section(name)]
    return "\n".join([PAGE_HEAD, *table, "", *sections, PAGE_COSTS, *costs.page(), "", PAGE_FLAGS, *_flags(), ""])


def _dense_section(name: str) -> list[str]:
    """The same of a recipe of segmentation or detection."""
    indented = (f"    {line}" if line.startswith("deepspeed ") else line for line in entry(name).text.splitlines())
    return [f"## {name}", "", *indented, "", dense_recipes.changed(name), ""]


def _section(name: str) -> list[str]:
    """A recipe's heading, its description and what it sets."""
    recipe, base = recipes.from_name(name), Recipe()
    indented = (f"    {line}" if line.startswith("deepspeed ") else line for line in entry(name).text.splitlines())
    changed = [
        field.name
        for field in dataclasses.fields(Recipe)[1:]
        if getattr(recipe, field.name) != getattr(base, field.name)
    ]
    values = ", ".join(f"`{field} {_text(getattr(recipe, field))}`" for field in changed)
    sets = f"Sets {values}." if values else "Sets nothing: it is the base."
    true = [line for sentence in truth(recipe) for line in (_one_cell(sentence), "")]
    return [f"## {name}", "", *indented, "", *true, sets, ""]


def _flags() -> list[str]:
    """The table of all flags."""
    rows = ["| flag | what | base | from |", "|---|---|---|---|"]
    for field in dataclasses.fields(Recipe)[1:]:
        cells = (field.metadata["help"], _text(field.default), origin(Recipe(), field.name))
        rows.append(f"| `--{field.name}` | {' | '.join(map(_one_cell, cells))} |")
    return rows


def _one_cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|")


def _text(value: object) -> str:
    return "-" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """`fasthpm recipes`."""
    parser = Parser(prog="fasthpm recipes", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="recipe to show (default: list all)")
    parser.add_argument(
        "--diff", default="", metavar="OTHER", help="show only the fields in which NAME and OTHER differ"
    )
    parser.add_argument("--markdown", action="store_true", help="write all recipes and flags as Markdown")
    arguments = parser.parse_args(argv)
    if arguments.markdown and (arguments.name or arguments.diff):
        raise UserError("--markdown writes all recipes; leave NAME and --diff out")
    if arguments.diff and not arguments.name:
        raise UserError(f"--diff {arguments.diff} needs a recipe to compare with: fasthpm recipes NAME --diff OTHER")
    if arguments.markdown:
        print(markdown(), end="")
    elif not arguments.name:
        print("\n".join(listing()))
    else:
        print("\n".join(difference(arguments.name, arguments.diff) if arguments.diff else show(arguments.name)))
