"""Every error that a recipe raises on its own account, in one tree.

    RecipeError            ends the recipe with one clear message (exit code 1)
    ├── SettingsError      a setting is unknown, or its value cannot be used (exit code 2)
    ├── InputError         an input is missing, unreadable, or changed while it was read
    ├── TokenizerError     the tokenizer cannot be loaded or trained
    ├── TemplateError      the chat template is not there, or cannot be used
    ├── OutputError        the output directory holds something else, or is in use
    ├── ClusterError       the Ray cluster lacks what the pipeline needs
    ├── PipelineError      a stage of the pipeline failed
    ├── TrainingError      training cannot begin or go on, or a training worker failed
    ├── TrackingError      raywb could not start or finish the run
    └── CountsError        rows in ≠ rows kept + filtered + errors: a bug, never to be hidden

What is wrong with a single document is no error: it is counted by kind (``documents.py``).
"""

from __future__ import annotations

__all__ = [
    "ClusterError",
    "CountsError",
    "InputError",
    "OutputError",
    "PipelineError",
    "RecipeError",
    "SettingsError",
    "TemplateError",
    "TokenizerError",
    "TrackingError",
    "TrainingError",
]


class RecipeError(Exception):
    """Base of everything that a recipe raises on its own account."""

    #: What the process returns to the shell.
    exit_code = 1


class SettingsError(RecipeError):
    """Raised when a setting is unknown, or has a value that cannot be used."""

    exit_code = 2


class InputError(RecipeError):
    """Raised when an input is missing, unreadable, or changed while it was read."""


class TokenizerError(RecipeError):
    """Raised when the tokenizer cannot be loaded, or trained from the input."""


class TemplateError(RecipeError):
    """Raised when there is no chat template, or it cannot be used."""


class OutputError(RecipeError):
    """Raised when the output directory holds something else, or another recipe writes to it."""


class ClusterError(RecipeError):
    """Raised when the Ray cluster lacks what the pipeline needs."""


class PipelineError(RecipeError):
    """Raised when a stage of the pipeline failed; the message names the cause."""


class TrainingError(RecipeError):
    """Raised when training cannot begin or go on, or a worker failed; the message says why."""


class TrackingError(RecipeError):
    """Raised when raywb could not start or finish the run."""


class CountsError(RecipeError):
    """Raised when rows in ≠ rows kept + filtered + errors, or tokens ≠ what the shard holds."""
