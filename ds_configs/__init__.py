"""DeepSpeed presets. This folder is a package so that a wheel carries it; `fasthpm.ranks.presets` finds its files."""
