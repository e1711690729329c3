"""The processes of a preparation: what they say of a sample that cannot be used."""

import tempfile

import pytest

from data_prep.pool import reason_of


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("cannot identify <_io.BytesIO object at 0x7fcc3bacd2b0>"), "cannot identify <_io.BytesIO object>"),
        (ValueError("[mov @ 0x55d0c8a0] moov atom not found"), "[mov] moov atom not found"),
        (OSError(2, "No such file or directory", "/tmp/x"), "No such file or directory"),
        (ValueError(f"cannot write {tempfile.gettempdir()}/tmpab12cd_8.tif today"), "cannot write today"),
        (ValueError("extraneous bytes\n before marker 0xd9"), "extraneous bytes before marker 0xd9"),
    ],
)
def test_reasons_are_the_same_in_every_run(error: Exception, reason: str) -> None:
    name = type(error).__name__
    assert reason_of(error) == f"{name}: {reason}"
