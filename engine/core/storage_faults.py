"""Faults of storage: which of them are retried, and how the others are reported."""

from __future__ import annotations

import errno
import functools
import random
import time
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from engine.core.errors import DamageError, StorageError
from engine.core.names import named_digest

P = ParamSpec("P")
T = TypeVar("T")

_ATTEMPTS = 5
# Client libraries of object stores, which have errors of their own, as for credentials.
_CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "adlfs")
_TRANSIENT = (errno.EIO, errno.EBUSY, errno.ETIMEDOUT, errno.ECONNRESET, errno.EAGAIN)


def with_retries(act: Callable[[], T]) -> T:
    """The result of `act`, called again after transient errors: time-outs, dropped connections and
    5xx replies, but not full disks, 403 and missing buckets."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return act()
        except OSError as error:
            transient = isinstance(error, TimeoutError | ConnectionError)
            if not transient and error.errno not in _TRANSIENT:
                raise
            # Exponential backoff with jitter.
            time.sleep(random.uniform(0.5, 1.0) * 0.2 * 2**attempt)
    return act()


def guarded(operation: Callable[P, T]) -> Callable[P, T]:
    """Retry transient errors of a `Store`'s method, and turn the others into a `StorageError` of
    one line that names the storage and the key."""
    name = operation.__name__

    @functools.wraps(operation)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return with_retries(functools.partial(operation, *args, **kwargs))
        except FileExistsError:
            raise
        except FileNotFoundError as error:
            # To a reader, absence is an answer; to a writer, it means a missing bucket.
            if name.startswith("put"):
                raise _fault(name, args, error.strerror or str(error)) from error
            raise _absence(name, args, error) from error
        except OSError as error:
            raise _fault(name, args, error.strerror or str(error)) from error
        except Exception as error:
            if type(error).__module__.split(".")[0] not in _CLIENTS:
                raise
            raise _fault(name, args, str(error)) from error

    return call


def _absence(operation: str, args: tuple[Any, ...], error: FileNotFoundError) -> Exception:
    """The error for a missing key. A missing part is damage, because a record names it."""
    store, key = args[0], str(args[1]) if len(args) > 1 else ""
    if named_digest(key) is None or operation not in ("read", "parquet"):
        return error
    return DamageError(f"{store.location(key)} is missing", key)


def _fault(operation: str, args: tuple[Any, ...], reason: str) -> StorageError:
    store, key = args[0], args[1] if len(args) > 1 else ""
    return StorageError(
        f"storage {getattr(store, 'url', '')}: cannot {operation.replace('_', ' ')} {key!s}:"
        f" {reason or 'no reason given'}; committed results are intact; fix this and run again"
    )
