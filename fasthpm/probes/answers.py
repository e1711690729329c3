"""How a run is best asked what is hard, and how true its answers are."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fasthpm import checkpoint
from fasthpm.cli import Parser
from fasthpm.difficulty import DIFFICULTIES, ask_by, refusal
from fasthpm.errors import UserError, warn
from fasthpm.model import HPMViT
from fasthpm.probes import difficulty_head
from fasthpm.probes.difficulty_head import HOW
from fasthpm.recipe import Recipe, load_recipe
from fasthpm.run.records import METRICS_FILE, latest, read_records

AUTO = "auto"
BEST_AFTER_OWN = ("in_place", "masked_query", "measured", "paper")  # for runs whose own way is `paper`, or none


@dataclass(frozen=True)
class Answers:
    """By what a run's `predict_loss` answers, and how well that agrees with the mean loss over random masks."""

    way: str  # of DIFFICULTIES; empty: the run can't say what is hard
    own: str  # by what the run itself was asked; empty: it was not
    weights: str  # "student" or "teacher"
    problem: str = ""  # why `way` is empty, the rest of a sentence
    spearman: float | None = None  # None: not measured
    auc: float | None = None
    source: str = ""  # of these figures

    @property
    def figures(self) -> dict[str, Any]:
        """For difficulty.json."""
        measured = {"difficulty_spearman": self.spearman, "difficulty_auc": self.auc, "measured": self.source}
        return {"difficulty": self.way, "own": self.own, "weights": self.weights, **measured}

    @property
    def line(self) -> str:
        """One line for the user, without the figures of an answer that was not measured."""
        if not self.way:
            return f"no difficulty: the run {self.problem}"
        other = f" (the run's own: {self.own or 'none'})" if self.way != self.own else ""
        if self.spearman is None:
            return f"difficulty {self.way}{other}, by the {self.weights}; difficulty_spearman not measured"
        return (
            f"difficulty {self.way}{other}, by the {self.weights}; difficulty_spearman {self.spearman:.3f}, "
            f"difficulty_auc {self.auc:.3f} ({self.source})"
        )


def add_flags(parser: Parser) -> None:
    """The flags that say how a run is asked, and which of its weights."""
    parser.add_argument(
        "--difficulty",
        choices=(AUTO, *DIFFICULTIES),
        default=AUTO,
        help="how the run is asked what is hard (default: in the best way that it has)",
    )
    parser.add_argument(
        "--weights",
        choices=(AUTO, "student", "teacher"),
        default=AUTO,
        help="auto = the student, or those that the difficulty head beside the run was fitted on",
    )


def load_asked(source: Path, asked: str = AUTO, weights: str = AUTO) -> tuple[HPMViT, Recipe, Answers]:
    """The model of a run or a checkpoint, asked in the best way that it has, or as `asked`.

    The best way is the run's own, unless that is `paper`, whose map is nearly unrelated to the true difficulty, or
    nobody can answer: then a head beside the run (`difficulty_head`), else `masked_query`, else `measured`. A head that
    agreed less than what comes next, when it was fitted, is passed over.

    - `asked`: "auto", or a name in `DIFFICULTIES`
    - `weights`: "student", "teacher", or "auto": the student, or what the head beside the run was fitted on

    **Raises:** `UserError` as `load_weights`, for a way that the run does not have, and for a head of another encoder.
    """
    folder = checkpoint.checkpoint_of(source)
    run, recipe = checkpoint.run_of(folder), load_recipe(folder / checkpoint.RECIPE)
    own, step = recipe.question.name, checkpoint.read_state(folder).step
    kept = None
    if asked == "in_place" or (asked == AUTO and (own == "paper" or not recipe.answers_difficulty)):
        kept = None if recipe.question.head else difficulty_head.read(run)
    if kept and asked == AUTO and _outdone(kept.notes):
        kept = None
    chosen = (kept.notes.weights if kept else "student") if weights == AUTO else weights
    model, _ = checkpoint.load_weights(folder, chosen)
    if kept:
        difficulty_head.attach(model, kept)
        _warn_of_age(kept, chosen, step)
    problem = _nobody(folder, model, recipe, own) if not kept else ""
    if asked != AUTO:
        _ask(model, asked, source, problem)
    elif not problem:
        ask_by(model, _best(model, own))
    found = Answers(
        "" if problem else model.difficulty, own if recipe.answers_difficulty else "", chosen, problem=problem
    )
    return model, recipe, _figures(found, run, step, kept)


def _outdone(notes: difficulty_head.HeadNotes) -> bool:
    """Whether the next best way agreed better, on the same samples."""
    found = [notes.others[name] for name in BEST_AFTER_OWN if name in notes.others]
    return bool(found) and found[0] > notes.difficulty_spearman


def _best(model: HPMViT, own: str) -> str:
    able = [name for name in BEST_AFTER_OWN if not refusal(model, name)]
    return own if own != "paper" and not refusal(model, own) else able[0]


def _nobody(folder: Path, model: HPMViT, recipe: Recipe, own: str) -> str:
    """Why the model cannot be asked at all: the rest of a sentence; empty if it can."""
    if checkpoint.lacks_decoder(folder):
        return checkpoint.NO_DECODER
    if all(refusal(model, name) for name in (own, *BEST_AFTER_OWN)):
        what = recipe.target if recipe.uses_views else f"{recipe.target} features"
        return f"has no loss predictor, and its losses are of {what}; fit a head: {HOW}"
    return ""


def _ask(model: HPMViT, asked: str, source: Path, problem: str) -> None:
    if problem:
        raise UserError(f"{source} {problem}")
    try:
        ask_by(model, asked)
    except UserError as error:
        hint = f"; to fit a head: {HOW}" if asked == "in_place" else ""
        raise UserError(f"{source}: {error}{hint}") from error


def _warn_of_age(kept: difficulty_head.KeptHead, weights: str, step: int) -> None:
    theirs = (kept.notes.weights, kept.notes.step)
    if theirs != (weights, step):
        warn(
            f"{kept.path} was fitted on the {theirs[0]} at update {theirs[1]}, and answers for the {weights} at update "
            f"{step}; to fit it anew: {HOW}"
        )


def _figures(answers: Answers, run: Path, step: int, kept: difficulty_head.KeptHead | None) -> Answers:
    """`answers` with what was measured of them before."""
    if kept:
        notes = kept.notes
        where = f"when {kept.path.name} was fitted, on samples held out of {notes.data}"
        return replace(answers, spearman=notes.difficulty_spearman, auc=notes.difficulty_auc, source=where)
    found = latest(read_records(run / METRICS_FILE), "difficulty_spearman", step)
    if not answers.way or answers.way != answers.own or not found:
        return answers
    where = f"the run's own measurement at update {found['step']}"
    return replace(answers, spearman=found["difficulty_spearman"], auc=found["difficulty_auc"], source=where)
