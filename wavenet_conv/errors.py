"""The kinds of error. Every message names the thing, where it is, and the fix.

Each class is also the built-in error that a caller expects there, so `except ValueError` works too.
"""

from __future__ import annotations


class WaveNetConvError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(WaveNetConvError, ValueError):
    """A model that cannot be built: a kernel size of 0, widths that do not match the layers."""


class NamesError(WaveNetConvError, ValueError):
    """A name or a list of names that cannot be read: an unknown character, an empty file.

    A caller that knows the file builds its own message from the attributes, which are None where there is none.

    Attributes:
        index: The index of the name in its list.
        position: The position in the name.
        character: The character there.
    """

    def __init__(
        self, message: str, *, index: int | None = None, position: int | None = None, character: str | None = None
    ):
        super().__init__(message)
        self.index, self.position, self.character = index, position, character


class TokenError(WaveNetConvError, IndexError):
    """A token outside the vocabulary."""


class ShapeError(WaveNetConvError, ValueError):
    """Tokens of the wrong shape or dtype, or a sequence shorter than the context."""


class MappingError(WaveNetConvError, ValueError):
    """A tree without an equal convolutional model, or a layer that the mapping does not know."""


class ModeError(WaveNetConvError, RuntimeError):
    """A model in training mode where evaluation is needed, or a training batch without a variance."""


class DownloadError(WaveNetConvError, OSError):
    """A download that failed, or that returned other data."""


class CheckpointError(WaveNetConvError, ValueError):
    """A checkpoint that cannot be read, or that this library did not write."""


class OutputError(WaveNetConvError, OSError):
    """An output that cannot be written, or that belongs to another run."""


class TrainingError(WaveNetConvError, ArithmeticError):
    """A training run whose loss is NaN or has exploded."""


class SamplingError(WaveNetConvError, ArithmeticError):
    """A model whose logits are NaN or infinite, so that nothing can be drawn from them."""


class StateError(WaveNetConvError, ValueError):
    """A stream's state that belongs to another model or another batch."""


class UsageError(WaveNetConvError, ValueError):
    """A request that cannot start: a missing file or model, an output of another run."""
