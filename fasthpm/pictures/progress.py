"""The panel of a run as it stands."""

from pathlib import Path

from fasthpm import schedule
from fasthpm.data.shown import shown_of
from fasthpm.patches import model_of
from fasthpm.pictures import drawing, panels
from fasthpm.run.metrics import Metrics, overview_tag
from fasthpm.run.records import METRICS_FILE, latest, read_records
from fasthpm.run.state import Run
from fasthpm.step import Step

PANEL_IMAGES, PANEL_CLIPS = 8, 2


def draw_panel(run: Run[Step], metrics: Metrics) -> None:
    """A picture of the fixed images as the run sees them now, by its teacher if it has one. Collective."""
    weights = run.weights()
    if run.launch.rank:
        return
    model = model_of(run.recipe).eval().to(run.launch.device)
    model.load_state_dict(weights.get("teacher", weights["student"]))
    images, info = panels.fixed_images(run.recipe, PANEL_CLIPS if model.video else PANEL_IMAGES)
    alpha = schedule.alpha_at(run.recipe, run.done - 1)
    path = Path(run.recipe.output_dir) / "panels" / f"step-{run.done:08d}.png"
    found = latest(read_records(Path(run.recipe.output_dir) / METRICS_FILE), "difficulty_spearman", run.done)
    spearman = found.get("difficulty_spearman")
    shown = shown_of(info.values, info.channels, run.recipe.show)
    pictures = panels.pictures(model, run.recipe, info, images, alpha, run.step.frozen, spearman=spearman, shown=shown)
    picture = drawing.sheet(pictures, model.tubelet_size if model.video else 0)
    animation = drawing.animation(pictures) if model.video else b""
    with metrics.surviving_the_disk(run.done, "the panel"):
        path.parent.mkdir(exist_ok=True)
        drawing.save_png(picture, path)
        if animation:
            drawing.save_gif(animation, path.with_suffix(".gif"))
    for tag in (overview_tag("panel"), "panel"):  # as figures, under its own name too
        metrics.image(tag, picture, run.done)
    for tag in (overview_tag("clips"), "clips") if animation else ():
        metrics.animation(tag, animation, run.done)
