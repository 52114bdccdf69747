"""Named errors. Every message says what must hold and what was found."""


class KimiNativeError(Exception):
    """Base of the errors that a bad file, a bad request or a too small machine causes."""


class ModelFormatError(KimiNativeError, ValueError):
    """A checkpoint file is malformed: truncated, overlapping, missing, of a wrong shape or dtype."""


class ConfigError(KimiNativeError, ValueError):
    """config.json (or a sibling) holds a key or value that this package does not support."""


class TokenizerError(KimiNativeError, ValueError):
    """The tokenizer files are malformed or a text cannot be encoded as asked."""


class CheckpointWriteError(KimiNativeError, OSError):
    """A checkpoint cannot be written: no room on the disk, a folder in use, a failed write."""


class RequestError(KimiNativeError, ValueError):
    """A generation request is out of range: prompt beyond the context, unknown or bad argument."""


class MemoryPlanError(KimiNativeError, MemoryError):
    """The model would not fit; the message names the setting that would make it fit."""


class MemoryPlanWarning(UserWarning):
    """The model runs, but its weights do not all stay in memory; the message says what that costs."""


class NonFiniteLogitsError(KimiNativeError, ArithmeticError):
    """A forward pass produced NaN or infinite logits; no token is sampled from them."""


class DivergedError(KimiNativeError, ArithmeticError):
    """Training produced a number that is not finite; the message names the step and the tensor."""
