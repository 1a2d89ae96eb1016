"""A bad file costs only its own row, whatever it does to the process that decodes it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.data.images import Preprocess, Rejected, decode_own
from engine.data.sandbox import Sandbox, serve

SPEC = Preprocess(size=16)

# A child that speaks the sandbox's protocol and fails like a broken decoder.
FAKE_CHILD = """
import json, os, signal, struct, sys, time
def send(header, body=b""):
    text = json.dumps(header).encode()
    sys.stdout.buffer.write(struct.pack("<II", len(text), len(body)) + text + body)
    sys.stdout.buffer.flush()
send({"ready": True})
while sizes := sys.stdin.buffer.read(8):
    head, body = struct.unpack("<II", sizes)
    sys.stdin.buffer.read(head)
    order = sys.stdin.buffer.read(body)
    if order == b"hang":
        time.sleep(1000)
    if order.startswith(b"once ") and not os.path.exists(order[5:]):
        open(order[5:], "w").close()
        time.sleep(1000)
    if order == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if order == b"exit":
        sys.exit(3)
    if order == b"half":
        sys.stdout.buffer.write(b"\\x10")
        sys.stdout.buffer.flush()
        sys.exit(0)
    answer = {"width": 1, "height": 2, "pixel_sha256": str(os.getpid()), "phash": "00"}
    send(answer, b"pixels")
"""


class FakeSandbox(Sandbox):
    """The real protocol with a fake child instead of Pillow."""

    def _exchange(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        if self._child is None:
            self._child = subprocess.Popen(
                [sys.executable, "-S", "-c", FAKE_CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self._receive(time.monotonic() + 60)
        return super()._exchange(header, body)


@pytest.fixture(autouse=True)
def warm_decoders() -> None:
    """Every test starts its own processes."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """One child for all tests that do not kill it, because starting it takes a second."""
    with Sandbox(SPEC) as sandbox:
        yield sandbox


def png(color: str = "red", side: int = 20) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (side, side), color).save(target, "PNG")
    return target.getvalue()


def rejection(sandbox: Sandbox, data: bytes, uri: str = "a.png") -> Rejected:
    with pytest.raises(Rejected) as caught:
        sandbox.decode(data, uri)
    return caught.value


def test_image_is_returned_preprocessed_with_its_properties(sandbox: Sandbox) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(picture).save(target, "PNG")
    decoded = sandbox.decode(target.getvalue(), "a.png")
    again = sandbox.decode(target.getvalue(), "other/name.png")
    assert decode_own(decoded.encoded).shape == (16, 16, 3)
    assert (decoded.width, decoded.height) == (40, 30)
    assert len(decoded.phash) == 16
    assert len(decoded.pixel_sha256) == 64
    assert again == decoded


def test_bad_files_cost_only_their_row_and_no_child_process(sandbox: Sandbox) -> None:
    target = io.BytesIO()
    Image.new("1", (8000, 8000)).save(target, "PNG")
    sandbox.decode(png(), "first.png")
    child = sandbox._child
    assert rejection(sandbox, b"").reason == "empty"
    assert rejection(sandbox, b"<html>", "a.jpg").reason == "not_decodable"
    assert rejection(sandbox, png(), "a.jpg").reason == "wrong_extension"
    assert rejection(sandbox, target.getvalue()).reason == "too_large"
    assert sandbox.decode(png("blue"), "last.png").width == 20
    assert sandbox._child is child


def test_any_file_name_reaches_the_child(sandbox: Sandbox) -> None:
    for uri in ("Bild ü\n.png", "\udcff.png", "x" * 5000 + ".png", '"{}.png'):
        assert sandbox.decode(png(), uri).height == 20


@pytest.mark.parametrize(
    ("order", "reason", "detail"),
    [
        (b"hang", "decoder_hang", "more than 0.5 s"),
        (b"crash", "decoder_crash", "exit -11"),
        (b"exit", "decoder_crash", "exit 3"),
        (b"half", "decoder_crash", "exit 0"),
    ],
)
def test_dying_or_hanging_decoder_costs_one_row(order: bytes, reason: str, detail: str) -> None:
    with FakeSandbox(SPEC, timeout=0.5) as sandbox:
        before = sandbox.decode(b"fine", "a.png")
        child = sandbox._child
        rejected = rejection(sandbox, order)
        assert rejected.reason == reason
        assert detail in str(rejected)
        assert child is not None
        assert child.poll() is not None  # ended, not left behind
        after = sandbox.decode(b"fine", "b.png")
        assert after.pixel_sha256 != before.pixel_sha256  # another process answered


def test_slow_file_is_tried_again(tmp_path: Path) -> None:
    with FakeSandbox(SPEC, timeout=0.5) as sandbox:
        assert sandbox.decode(f"once {tmp_path / 'seen'}".encode(), "a.png").height == 2


def test_killed_child_is_replaced_and_closing_ends_it() -> None:
    sandbox = Sandbox(SPEC, check_extension=False)
    sandbox.decode(png(), "a.png")
    assert sandbox._child is not None
    sandbox._child.kill()
    sandbox._child.wait()
    assert rejection(sandbox, png()).reason == "decoder_crash"
    assert sandbox.decode(png(), "extensions_do_not_count_here.jpg").width == 20
    child = sandbox._child
    assert child is not None
    sandbox.close()
    sandbox.close()
    assert child.poll() is not None


def test_child_exits_when_its_parent_is_gone(tmp_path: Path) -> None:
    settings = {"preprocess": SPEC.model_dump(), "check_extension": True}
    child = subprocess.Popen(
        [sys.executable, "-m", "engine.data.sandbox", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=Path(serve.__code__.co_filename).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(timeout=60) == 0


def test_child_that_reads_hostile_files_gets_no_secrets(monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    with Sandbox(Preprocess(size=8)) as box:
        with pytest.raises(Rejected):
            box.decode(b"", "x.png")
        environment = Path(f"/proc/{box._child.pid}/environ").read_bytes()
    assert b"PATH=" in environment
    assert b"canary" not in environment
