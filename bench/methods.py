"""What `bench.step` and `bench.roofline` compare: MAE, HPM, and each way to ask what is hard, plain and made cheap."""

from dataclasses import dataclass
from typing import Any

from fasthpm.recipes import FAST_REFRESH_EPOCHS


@dataclass(frozen=True)
class Method:
    """A way to train, as changes to HPM's recipe."""

    title: str
    difficulty: str = ""  # how the teacher is asked; empty = there is none: MAE
    predictor: str = "none"  # the student's loss predictor: none, separate or shared
    cross: bool = False  # cross-attention decoders
    maps: bool = False  # the teacher's maps are kept, and renewed every FAST_REFRESH_EPOCHS

    @property
    def fields(self) -> dict[str, Any]:
        """What it changes in HPM's recipe; nothing of MAE, which has a recipe of its own."""
        if not self.difficulty:
            return {}
        changes: dict[str, Any] = {"difficulty": self.difficulty}
        if self.predictor == "none":
            changes["predict_loss"] = "none"
        else:
            changes["predictor"] = self.predictor
        if self.cross:
            changes["decoder_attention"] = "cross"
        if self.maps:
            changes |= {"teacher_maps": True, "map_refresh_epochs": FAST_REFRESH_EPOCHS}
        return changes


METHODS = {
    "mae": Method("own MAE"),
    "hpm": Method("exact HPM", "paper", "separate"),
    "hpm_masked_query": Method("masked_query HPM", "masked_query", "separate"),
    "hpm_fast": Method("fast HPM", "masked_query", "shared", cross=True, maps=True),
    "in_place": Method("in_place HPM", "in_place", "separate"),
    "in_place_alone": Method("in_place alone", "in_place"),
    "in_place_maps": Method("in_place, kept maps", "in_place", maps=True),
    "in_place_fast": Method("in_place, kept maps, cross", "in_place", cross=True, maps=True),
    "measured_alone": Method("measured alone", "measured"),
    "measured_cross": Method("measured, cross", "measured", cross=True),
    "measured_maps": Method("measured, kept maps", "measured", maps=True),
    "measured_fast": Method("measured, kept maps, cross", "measured", cross=True, maps=True),
}
