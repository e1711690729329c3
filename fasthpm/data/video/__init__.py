"""Videos as stored frames: the set, which clip and crop, our loader and DALI's."""
