"""The adapter of one module of a LoRA: an algorithm, its factors, alpha, and for DoRA the magnitudes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain, product

from ...schemas.errors import LayoutError
from ...schemas.lora_keys import Algorithm, is_depthwise
from ...schemas.tensors import Shape
from .factors import Factor, reshaped, rows

# The complete sets of factors of each algorithm: one choice out of each tuple.
_CHOICES: Mapping[Algorithm, tuple[tuple[str, ...], ...]] = {
    Algorithm.LORA: (("lora_up lora_down",), ("", "lora_mid")),
    Algorithm.LOHA: (("hada_w1_a hada_w1_b hada_w2_a hada_w2_b",), ("", "hada_t1 hada_t2")),
    Algorithm.LOKR: (
        ("lokr_w1", "lokr_w1_a lokr_w1_b"),
        ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2"),
    ),
    Algorithm.FULL: (("diff",),),
}
COMPLETE = {
    algorithm: [frozenset(" ".join(chosen).split()) for chosen in product(*choices)]
    for algorithm, choices in _CHOICES.items()
}
FACTOR_NAMES = {
    algorithm: tuple(dict.fromkeys(" ".join(chain(*choices)).split())) for algorithm, choices in _CHOICES.items()
}

# The factors whose rows are the rows of the weight, in products without a core.
ROW_FACTORS: Mapping[Algorithm, tuple[str, ...]] = {
    Algorithm.LORA: ("lora_up",),
    Algorithm.LOHA: ("hada_w1_a", "hada_w2_a"),
    Algorithm.FULL: ("diff",),
}
CORES = frozenset({"lora_mid", "hada_t1"})


class Axis(StrEnum):
    """The axis along which a DoRA has its magnitudes: output rows (PEFT), or input columns (kohya's default)."""

    OUTPUT = "output"
    INPUT = "input"


@dataclass(frozen=True)
class Magnitude:
    """DoRA's learned norms, flat: one for each output row or input column of the weight."""

    factor: Factor
    axis: Axis


@dataclass(frozen=True)
class Adapter:
    """The change of one weight of `shape`. `factors` have LyCORIS' names; alpha None means that alpha is the rank."""

    algorithm: Algorithm
    factors: Mapping[str, Factor]
    alpha: float | None
    shape: Shape
    magnitude: Magnitude | None = None

    @property
    def rank(self) -> int | None:
        """None for a LoKr of two whole matrices and for a difference, which are not scaled either."""
        for name in ("lora_down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if name in self.factors:
                return self.factors[name].shape[0]
        return None

    @property
    def scale(self) -> float:
        """The number that the product of the factors is multiplied by: alpha / rank."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank

    @property
    def folded(self) -> bool:
        """True when the product is one long row, to be folded into the weight's shape.

        OneTrainer trains depthwise convolutions so: lora_up [1, r, 1, 1] and lora_down [r, C, 3, 3] for a weight
        [C, 1, 3, 3]."""
        names = ROW_FACTORS.get(self.algorithm, ())
        rows = {self.factors[name].shape[:1] for name in names if not CORES & self.factors.keys()}
        return is_depthwise(self.shape) and rows == {(1,)}


def make_adapter(factors: Mapping[str, Factor], alpha: float | None, shape: Shape) -> Adapter:
    """Return the adapter of a weight of `shape` from the factors found for it; alpha 0 counts as missing.

    Raises LayoutError when a factor is missing or a shape does not fit."""
    names = {name for name in factors if name not in ("dora_scale", "magnitude")}
    algorithm = _algorithm(names)
    own = {name: factors[name] for name in FACTOR_NAMES[algorithm] if name in names}
    _check_complete(algorithm, names)
    scalars = [name for name, factor in own.items() if not factor.shape]
    if scalars:
        raise LayoutError(f"expected a tensor with axes, found a single number: {', '.join(scalars)}")
    adapter = Adapter(algorithm, own, alpha or None, shape, _magnitude(factors, shape))
    if adapter.rank == 0:
        raise LayoutError("its rank is 0")
    _check_depthwise(adapter)
    made = _made_shape(adapter)
    if made[0] != (1 if adapter.folded else shape[0]) or math.prod(made) != math.prod(shape):
        raise LayoutError(f"expected factors of a weight {list(shape)}, found those of {list(made)}")
    return _with_weight_axes(adapter)


def _algorithm(names: set[str]) -> Algorithm:
    found = [algorithm for algorithm, own in FACTOR_NAMES.items() if names & set(own)]
    if len(found) != 1:
        what = " and ".join(found) if found else "neither factors of LoRA, LoHa nor LoKr, nor a difference"
        raise LayoutError(f"expected the factors of one algorithm, found {what}")
    return found[0]


def _check_depthwise(adapter: Adapter) -> None:
    """Raise LayoutError for PEFT's LoRA of a depthwise convolution.

    Its lora_down is a convolution over all channels, whose effect no change of the depthwise weight has."""
    down = adapter.factors.get("lora_down")
    if down is None or not is_depthwise(adapter.shape) or adapter.folded:
        return
    if len(down.shape) == 4 and down.shape[1] == adapter.shape[0]:
        raise LayoutError(
            f"expected a LoRA of a depthwise convolution {list(adapter.shape)}, found one over all channels at once "
            f"(lora_down {list(down.shape)}), which cannot be merged; train without this module"
        )


def _check_complete(algorithm: Algorithm, names: set[str]) -> None:
    if names not in COMPLETE[algorithm]:
        nearest = min(COMPLETE[algorithm], key=lambda complete: len(complete ^ names))
        raise LayoutError(f"expected {' + '.join(sorted(nearest))}, found {' + '.join(sorted(names))}")


def _made_shape(adapter: Adapter) -> Shape:
    """Return the shape of the factors' product, as rows and columns. Raises LayoutError for factors that do not fit."""
    shapes = {name: factor.shape for name, factor in adapter.factors.items()}
    match adapter.algorithm:
        case Algorithm.LORA:
            return _product(shapes, "lora_up", "lora_down", "lora_mid", transposed=False)
        case Algorithm.LOHA:
            first = _product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
            second = _product(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
            if first != second:
                raise LayoutError(f"expected two products of one shape, found {list(first)} and {list(second)}")
            return first
        case Algorithm.LOKR:
            one = _matrix(shapes, "lokr_w1", "lokr_w1_a", "lokr_w1_b", "")
            two = _matrix(shapes, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
            return one[0] * two[0], one[1] * two[1]
        case Algorithm.FULL:
            diff = shapes["diff"]
            return diff if diff else (1,)


def _matrix(shapes: Mapping[str, Shape], whole: str, a: str, b: str, core: str) -> Shape:
    if whole in shapes:
        shape = shapes[whole]
        if len(shape) < 2:
            raise LayoutError(f"expected {whole} to be a matrix, found shape {list(shape)}")
        return shape[0], math.prod(shape[1:])
    return _product(shapes, a, b, core)


def _product(shapes: Mapping[str, Shape], a: str, b: str, core: str, *, transposed: bool = True) -> Shape:
    """Return the rows and columns of a @ b, or of core ×₁ a ×₂ b with Tucker's core [r, s, kh, kw].

    Beside a core, `a` is `transposed` in all algorithms except LoRA."""
    left, right = shapes[a], shapes[b]
    if len(left) < 2 or len(right) < 2 or math.prod(left[2:]) != 1:
        raise LayoutError(f"expected {a} and {b} to be matrices, found {list(left)} and {list(right)}")
    if core not in shapes:
        if left[1] != right[0]:
            raise LayoutError(
                f"expected one rank, found {left[1]} in {a} {list(left)} and {right[0]} in {b} {list(right)}"
            )
        return left[0], math.prod(right[1:])
    out, rank = (left[1], left[0]) if transposed else (left[0], left[1])
    middle = shapes[core]
    if len(middle) < 2 or middle[:2] != (rank, right[0]) or math.prod(right[2:]) != 1:
        raise LayoutError(f"expected {core} to begin with [{rank}, {right[0]}], found {list(middle)}")
    return out, right[1] * math.prod(middle[2:])


def _with_weight_axes(adapter: Adapter) -> Adapter:
    """Give a plain LoRA's factors the weight's axes: [r, in(, h, w)] and [out, r(, 1, 1)]; a difference its shape."""
    if adapter.algorithm is Algorithm.FULL:
        return replace(adapter, factors={"diff": reshaped(adapter.factors["diff"], adapter.shape)})
    if adapter.algorithm is not Algorithm.LORA or adapter.folded or "lora_mid" in adapter.factors:
        return adapter
    down, up = adapter.factors["lora_down"], adapter.factors["lora_up"]
    rank, rest = down.shape[0], adapter.shape[1:]
    up = reshaped(up, (up.shape[0], rank, *(1 for _ in rest[1:])))
    return replace(adapter, factors={"lora_up": up, "lora_down": reshaped(down, (rank, *rest))})


def _magnitude(factors: Mapping[str, Factor], shape: Shape) -> Magnitude | None:
    factor = factors.get("magnitude", factors.get("dora_scale"))
    if factor is None:
        return None
    by_output = "magnitude" in factors or factor.shape[:1] == shape[:1]
    axis, expected = (Axis.OUTPUT, shape[0]) if by_output else (Axis.INPUT, shape[1])
    if math.prod(factor.shape) != expected or max(factor.shape, default=1) != expected:
        raise LayoutError(f"expected DoRA magnitudes for a weight {list(shape)}, found shape {list(factor.shape)}")
    return Magnitude(reshaped(factor, (expected,)), axis)


def split_rows(adapter: Adapter, parts: int) -> list[Adapter]:
    """Cut an adapter into the adapters of `parts` equal blocks of the weight's rows.

    Raises LayoutError for changes that cannot be cut: LoKr, Tucker cores, and DoRA along the inputs."""
    height = adapter.shape[0] // parts
    by_row, magnitude = ROW_FACTORS.get(adapter.algorithm), adapter.magnitude
    if by_row is None or CORES & adapter.factors.keys() or (magnitude and magnitude.axis is Axis.INPUT):
        raise LayoutError(
            f"expected a change that can be cut into {parts} blocks of rows (LoRA, LoHa), found {adapter.algorithm}"
            + (" with DoRA magnitudes of the inputs" if magnitude else "")
        )
    cuts = []
    for start in range(0, parts * height, height):
        stop = start + height
        factors = {n: rows(f, start, stop) if n in by_row else f for n, f in adapter.factors.items()}
        cut = replace(magnitude, factor=rows(magnitude.factor, start, stop)) if magnitude else None
        cuts.append(replace(adapter, factors=factors, shape=(height, *adapter.shape[1:]), magnitude=cut))
    return cuts
