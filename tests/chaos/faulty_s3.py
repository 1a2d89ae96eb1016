"""An S3 server (moto) that refuses some requests, answers some late, and executes some without an
answer."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>later</Message></Error>"


class Faulty:
    """A WSGI application that fails for a share of its requests. faults: how often, by kind."""

    def __init__(self, app: Wsgi, share: float, seed: int) -> None:
        self.app, self.share, self.dice = app, share, random.Random(seed)
        self.lock = threading.Lock()
        self.faults: Counter[str] = Counter()
        self.requests = 0

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            self.requests += 1
            kind = self.dice.choice(("refused", "late", "unanswered"))
            if self.dice.random() >= self.share:
                kind = ""
            else:
                self.faults[kind] += 1
            seconds = 0.2 + self.dice.random()
        if kind == "refused":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml")])
            return [_SLOW_DOWN]
        if kind == "late":
            time.sleep(seconds)
        answer = self.app(environ, start if kind != "unanswered" else lambda *_: lambda _: None)
        if kind == "unanswered":
            for _ in answer:  # executed, but without an answer
                pass
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        return answer


@contextmanager
def faulty_s3(share: float, seed: int) -> Iterator[tuple[str, Faulty]]:
    """The address of such a server, and its application. Faults begin when `share` is set."""
    app = Faulty(DomainDispatcherApplication(create_backend_app), share, seed)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}", app
    finally:
        server.shutdown()
        thread.join()
