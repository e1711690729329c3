"""Variants of a bench."""

import pytest

from bench import variants
from bench.variants import Spec


def test_a_variant_that_fails_says_why() -> None:
    with variants.started([Spec("broken", "ours", "/nowhere.beton", 1, 1)]) as (broken,):
        with pytest.raises(RuntimeError, match=r"broken: (?s:.*)nowhere\.beton does not exist"):
            broken.measure(0)
