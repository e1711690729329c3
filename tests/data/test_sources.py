"""Lists of prepared sets."""

from fasthpm.data.sources import split_sources


def test_a_list_of_sets_may_be_longer_than_a_file_name() -> None:
    assert split_sources(",".join(["a" * 100 + ".beton"] * 100)) == ["a" * 100 + ".beton"] * 100
