"""Errors a user can act on.

Each message names the file, row or key, what was found, what was expected and the fix. Entry points
print the message without a traceback and leave with status 1.
"""


class TrsrError(Exception):
    """Base of every error that a user can fix."""


class ConfigError(TrsrError):
    """A setting is unknown, of a wrong type, or contradicts another."""


class DataError(TrsrError):
    """Input data or a shard is missing, malformed or inconsistent."""


class RunError(TrsrError):
    """A run folder is locked, holds other work, or its inputs have changed."""


class ModelError(TrsrError):
    """A model, tokenizer or adapter cannot be used as asked."""


class CheckpointError(TrsrError):
    """A checkpoint is missing, incomplete, corrupt or belongs to another run."""


class EngineError(TrsrError):
    """A generation engine failed for good."""
