"""Decoding of foreign images in a child process that may be killed.

A file that crashes or hangs a decoder costs only its own row: the child is killed, the row is
quarantined, and the next row gets a new child. One child serves thousands of images; the exchange
costs tens of microseconds per image.

A message on a pipe is the length of the header and of the body (two 32-bit integers), a JSON
header, and the body. The child is `python -m engine.data.sandbox`.
"""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from engine.core.errors import EngineError
from engine.data.decoding import decode
from engine.data.images import (
    Preprocess,
    Rejected,
    encode,
    perceptual_hash,
    pixel_sha256,
    preprocess,
)

_SIZES = struct.Struct("<II")
_MEMORY_BYTES = 6 * 2**30
_START_SECONDS = 120


@dataclass(frozen=True)
class Decoded:
    """A foreign image after preprocessing.

    encoded: by the study's codec. width, height: of the original, in pixels. bits: that the values
    of a 16-bit picture use; None for other pictures, and with a window. frames: in the file, of
    which the first is used. acquisition: of
    `engine.data.decoding.acquisition_of`.
    """

    encoded: bytes
    width: int
    height: int
    pixel_sha256: str
    phash: str
    bits: int | None = None
    frames: int = 1
    acquisition: dict[str, str] = field(default_factory=dict)


def _plain_environment() -> dict[str, str]:
    """The variables that Python needs to start; secrets stay out of a process that reads hostile
    files."""
    names = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME", "TMPDIR")
    return {name: os.environ[name] for name in names if name in os.environ}


def _package_root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Sandbox:
    """A child process that decodes, hashes, preprocesses and encodes one image at a time."""

    def __init__(
        self, preprocess: Preprocess, *, timeout: float = 20.0, check_extension: bool = True
    ) -> None:
        self.settings = {"preprocess": preprocess.model_dump(), "check_extension": check_extension}
        self.timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes, uri: str) -> Decoded:
        """Decode one image.

        Raises `Rejected`, also if the decoder crashes or twice exceeds `timeout` seconds: on an
        overloaded machine any file may be slow once.
        """
        try:
            try:
                header, body = self._exchange({"uri": uri}, data)
            except TimeoutError:
                self.close()
                header, body = self._exchange({"uri": uri}, data)
        except TimeoutError:
            self.close()
            raise Rejected("decoder_hang", f"more than {self.timeout:g} s") from None
        except (BrokenPipeError, EOFError):
            code = self._child.wait() if self._child else None
            self.close()
            raise Rejected("decoder_crash", f"exit {code}") from None
        if "reason" in header:
            raise Rejected(header["reason"], header["detail"])
        return Decoded(encoded=body, **header)

    def _exchange(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "engine.data.sandbox", json.dumps(self.settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**_plain_environment(), "PYTHONPATH": _package_root(), "OMP_NUM_THREADS": "1"},
                # Ctrl-C reaches the whole process group; this child ends when its pipe closes.
                start_new_session=True,
            )
            # Importing the decoders does not count towards the first image's time.
            try:
                self._receive(time.monotonic() + _START_SECONDS)
            except TimeoutError:
                self.close()
                raise EngineError(
                    f"{header['uri']}: the decoding process did not start within {_START_SECONDS}"
                    " s: the machine is overloaded; set fewer stages.decode.actors and run again"
                ) from None
        assert self._child.stdin is not None
        _send(self._child.stdin, header, body)
        return self._receive(time.monotonic() + self.timeout)

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytes]:
        assert self._child is not None
        assert self._child.stdout is not None
        handle = self._child.stdout.fileno()

        def exactly(count: int) -> bytes:
            chunks = bytearray()
            while len(chunks) < count:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([handle], [], [], left)[0]:
                    raise TimeoutError
                chunk = os.read(handle, min(count - len(chunks), 1 << 20))
                if not chunk:
                    raise EOFError
                chunks += chunk
            return bytes(chunks)

        head, body = _SIZES.unpack(exactly(_SIZES.size))
        return json.loads(exactly(head)), exactly(body)

    def close(self) -> None:
        """Kill the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue
            self._child = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _send(pipe: BinaryIO | Any, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    pipe.write(_SIZES.pack(len(text), len(body)) + text)
    pipe.write(body)
    pipe.flush()


def serve(settings: dict[str, Any], requests: BinaryIO, replies: BinaryIO) -> None:
    """The child's loop: one reply per request, until the pipe is closed."""
    import resource

    spec = Preprocess.model_validate(settings["preprocess"])
    # Without a limit, a decompression bomb could exhaust the machine's memory.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    _send(replies, {"ready": True}, b"")
    while sizes := requests.read(_SIZES.size):
        head, body = _SIZES.unpack(sizes)
        uri = json.loads(requests.read(head))["uri"]
        try:
            image = decode(
                requests.read(body), uri, check_extension=settings["check_extension"],
                window=spec.window,
            )  # fmt: skip
            header = {
                "width": image.width,
                "height": image.height,
                "pixel_sha256": pixel_sha256(image),
                "phash": perceptual_hash(image),
                "bits": image.info.get("bits"),
                "frames": image.info.get("frames", 1),
                "acquisition": image.info.get("acquisition", {}),
            }
            _send(replies, header, encode(preprocess(image, spec), spec))
        except Rejected as rejected:
            _send(replies, {"reason": rejected.reason, "detail": rejected.detail}, b"")
        except MemoryError:
            _send(replies, {"reason": "too_large", "detail": "out of memory while decoding"}, b"")


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
