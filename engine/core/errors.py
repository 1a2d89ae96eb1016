"""Errors that a user sees: one line each that says what is wrong, where, and what to change."""


class EngineError(Exception):
    """A run cannot continue. The command line prints the text only and exits with `exit_code`."""

    exit_code = 1


class StudyError(EngineError):
    """The study, the profile or the command line is wrong; nothing was computed."""

    exit_code = 2


class DataError(EngineError):
    """The images or their labels cannot be used as they are."""


class LeakError(DataError):
    """Images or groups are in more than one split."""


class StorageError(EngineError):
    """Storage refused or failed, or it contains data that this engine did not write."""


class DamageError(StorageError):
    """Data that this engine stored is missing or has changed.

    key: its key in the store. named: whether the text names the step that wrote it.
    """

    named = False

    def __init__(self, text: str, key: str = "") -> None:
        super().__init__(text)
        self.key = key


class ResumeError(EngineError):
    """Stored data was computed with other settings, code or weights."""


def brief(error: BaseException, most: int = 200) -> str:
    """The text of an error on one line, cut short."""
    return " ".join(str(error).split())[:most]


def one_line(error: BaseException) -> str:
    """The text of an error on one line, with the type's name for foreign errors."""
    text = brief(error, 500)
    return text if isinstance(error, EngineError) else f"{type(error).__name__}: {text}"
