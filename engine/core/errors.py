"""The errors that a person sees: one line each that says what is wrong, where, and what to
change."""


class EngineError(Exception):
    """A run cannot go on. The command line prints its text alone and exits with `exit_code`."""

    exit_code = 1


class StudyError(EngineError):
    """The study, the profile or the command line is wrong; nothing was computed."""

    exit_code = 2


class DataError(EngineError):
    """The images or their labels cannot be used as they are."""


class LeakError(DataError):
    """Images or groups stand in more than one split."""


class StorageError(EngineError):
    """Storage refused, failed or holds what this engine did not write."""


class DamageError(StorageError):
    """Something that this engine stored is missing or has changed.

    key: names it in the store. named: whether the text says which step wrote it.
    """

    named = False

    def __init__(self, text: str, key: str = "") -> None:
        super().__init__(text)
        self.key = key


class ResumeError(EngineError):
    """What lies in storage was made under other settings, code or weights."""


def in_a_line(error: BaseException) -> str:
    """What an error says; of one that is not ours, its kind too."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, EngineError) else f"{type(error).__name__}: {text}"
