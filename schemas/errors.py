"""The exceptions of cascadekit; every error that it raises on purpose is a CascadeError.

```
CascadeError
├── CheckpointError          a file cannot be read
├── LayoutError              tensors do not belong to the network
│   └── ForeignError         the file has nothing of the cascade
├── ConversionError          a file cannot be written
├── ExportError              a graph or bundle cannot be made
├── EngineError              an engine cannot load or run a stage
│   ├── OutsideProfileError  an engine was built for other sizes
│   └── UnsoundError         a stage gave useless values
├── ParityError              two runs cannot be compared
├── MissingPackageError      a package that the call needs is not installed
└── UsageError               the call itself is wrong
```

The text of an error names the file, what was expected, what was found, and what to do next:

```python
from cascadekit import Cascade, CascadeError

try:
    cascade = Cascade.open("bundle")
except CascadeError as error:
    print(error)  # bundle: not a bundle, it has no cascade.json; make one with `cascadekit export`
```
"""


class CascadeError(Exception):
    """Base class of every error that cascadekit raises on purpose."""


class CheckpointError(CascadeError):
    """A file cannot be read as the weights, config or tokenizer that it should be."""


class LayoutError(CascadeError):
    """The names or shapes of tensors are not those of the expected network and layout."""


class ForeignError(LayoutError):
    """A file seems sound but holds no network of the cascade."""


class ConversionError(CascadeError):
    """A checkpoint was read but cannot be written as asked."""


class ExportError(CascadeError):
    """A network cannot be written as a graph or bundle."""


class MissingPackageError(CascadeError):
    """A package that the call needs is not installed; for one that an engine needs, it is an EngineError."""


class EngineError(CascadeError):
    """An engine cannot load a stage, or got an input that the stage's ports do not take."""


class OutsideProfileError(EngineError):
    """An engine got an input of a size for which it was not built."""


class UnsoundError(EngineError):
    """A stage gave NaN, infinity or one value everywhere; `images` are the affected images, counted from 0."""

    def __init__(self, message: str, images: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.images = images


class ParityError(CascadeError):
    """Two runs cannot be compared."""


class UsageError(CascadeError):
    """The call itself is wrong: an argument, a size, an output that exists already."""


def reraise_interrupt(error: BaseException | None) -> None:
    """Raise the KeyboardInterrupt that caused `error`, if one did.

    An extension module turns Ctrl-C during its import into an ImportError. Callers that report a missing package call
    this function first, so that Ctrl-C is not reported as one."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            raise error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
