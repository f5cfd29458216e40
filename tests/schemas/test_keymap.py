"""Each rule kind forward and back on arange tensors, where a wrong cut shows in the values."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cascadekit.schemas.errors import LayoutError
from cascadekit.schemas.keymap import KeyMap, cut, drop, rename

QKV = cut("{}.in_proj", "{}.q", "{}.k", "{}.v")


def move(rules: KeyMap, tensors: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[np.int64]]:
    """Apply the rules to values, the plain way."""
    made = rules.apply({name: tensor.shape for name, tensor in tensors.items()})
    return {
        name: np.concatenate([np.atleast_1d(tensors[p.name])[p.start : p.stop] for p in tensor.rows]).reshape(
            tensor.shape
        )
        for name, tensor in made.items()
    }


def test_split_and_join_rows() -> None:
    joined = {"block.0.attn.in_proj": np.arange(12).reshape(6, 2), "other": np.arange(3)}
    split = move(KeyMap((QKV,)), joined)
    assert split["block.0.attn.q"].tolist() == [[0, 1], [2, 3]]
    assert split["block.0.attn.k"].tolist() == [[4, 5], [6, 7]]
    assert split["block.0.attn.v"].tolist() == [[8, 9], [10, 11]]
    assert split["other"].tolist() == [0, 1, 2]
    back = move(KeyMap((QKV,)).inverse, split)
    assert back.keys() == joined.keys()
    assert all((back[name] == joined[name]).all() for name in joined)


def test_join_takes_parts_in_the_order_of_the_rule_not_of_the_file() -> None:
    scrambled = {"a.v": np.full((1, 2), 3), "a.q": np.full((1, 2), 1), "a.k": np.full((1, 2), 2)}
    assert move(KeyMap((QKV,)).inverse, scrambled)["a.in_proj"][:, 0].tolist() == [1, 2, 3]


def test_rename_and_scalars() -> None:
    rules = KeyMap((rename("codebook.weight", "embedding.weight"),))
    moved = move(rules, {"codebook.weight": np.arange(4), "counter": np.array(7)})
    assert moved["embedding.weight"].tolist() == [0, 1, 2, 3]
    assert moved["counter"] == 7
    assert rules.inverse.inverse == rules


def test_drop_takes_away_in_both_directions() -> None:
    rules = KeyMap((drop("position_ids"),))
    assert not rules.apply({"position_ids": (1, 77)})
    assert not rules.inverse.apply({"position_ids": (1, 77)})


def test_names_with_braces_are_left_alone() -> None:
    assert list(KeyMap((QKV,)).apply({"odd{}name": (1,)})) == ["odd{}name"]


def test_rows_that_cannot_be_cut() -> None:
    with pytest.raises(LayoutError, match=r"a\.in_proj: shape \[7, 2\] cannot be cut into 3"):
        KeyMap((QKV,)).apply({"a.in_proj": (7, 2)})
    with pytest.raises(LayoutError, match="cannot be cut"):
        KeyMap((QKV,)).apply({"a.in_proj": ()})


def test_join_with_a_part_missing_or_misshapen() -> None:
    with pytest.raises(LayoutError, match=r"a\.in_proj needs a\.k, which is missing"):
        KeyMap((QKV,)).inverse.apply({"a.q": (1, 2), "a.v": (1, 2)})
    with pytest.raises(LayoutError, match=r"a\.k: expected shape \[1, 2\]"):
        KeyMap((QKV,)).inverse.apply({"a.q": (1, 2), "a.k": (2, 2), "a.v": (1, 2)})


def test_two_tensors_for_one_name() -> None:
    with pytest.raises(LayoutError, match="taken already"):
        KeyMap((QKV,)).apply({"a.q": (1, 2), "a.in_proj": (3, 2)})
