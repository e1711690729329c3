"""The sizes that follow from a recipe's fields: of images and clips, and of their grids of patches."""

from fasthpm import rules


class Sizes:
    """Part of `Recipe`."""

    input_size: str
    patch_size: int
    channels: int
    num_frames: int
    tubelet_size: int

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the training crop."""
        return rules.sides_of(self.input_size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image, (frames, height, width, channels) of a clip."""
        frames = (self.num_frames,) if self.num_frames > 1 else ()
        return *frames, *self.image_size, self.channels

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def slots(self) -> int:
        """Frame slots: tubelets along time, 1 for images."""
        return self.num_frames // self.tubelet_size

    @property
    def num_patches(self) -> int:
        """L."""
        return self.slots * self.grid_size[0] * self.grid_size[1]
