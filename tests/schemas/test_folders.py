"""Names and sizes of the files in a model folder."""

import pytest

from cascadekit.schemas.folders import parse_size


def test_sizes_are_decimal() -> None:
    assert [parse_size(text) for text in ("10GB", "1.5 mb", "2k", "123")] == [10**10, 1_500_000, 2000, 123]


@pytest.mark.parametrize("text", ["", "GB", "1XB", "-1", "0", "0.5", "0.0001KB", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 10GB or 500MB"):
        parse_size(text)
