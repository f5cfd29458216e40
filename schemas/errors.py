"""One exception tree: whatever goes wrong reaches the user as a CascadeError."""


class CascadeError(Exception):
    """Base of every error cascadekit raises on purpose; its text is what the user reads."""


class CheckpointError(CascadeError):
    """A file cannot be read as the weights, config or tokenizer it should be."""


class LayoutError(CascadeError):
    """Tensor names or shapes are not those of the network and layout they are taken for."""


class ForeignError(LayoutError):
    """A file is sound as far as can be seen, but holds no component of the cascade."""


class ConversionError(CascadeError):
    """A checkpoint was read but cannot be written in the layout asked for."""


class ExportError(CascadeError):
    """A network cannot be written as a graph or bundle."""


class EngineError(CascadeError):
    """An engine cannot load a stage, or was fed something its ports do not take."""


class OutsideProfileError(EngineError):
    """An engine was built for other sizes than it was fed."""


class UnsoundError(EngineError):
    """A stage gave NaN, infinity, or one value in every place; `images` are those it is about, counted from 0."""

    def __init__(self, message: str, images: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.images = images


class ParityError(CascadeError):
    """Two executions cannot be compared."""


class UsageError(CascadeError):
    """The call itself is wrong: an argument, a size, an existing output."""


def reraise_interrupt(error: BaseException | None) -> None:
    """Raise the KeyboardInterrupt that `error` comes from, if it comes from one.

    Extension modules turn whatever strikes while they are imported into an ImportError; Ctrl-C is no lack of a
    package."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            raise error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
