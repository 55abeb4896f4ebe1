"""The input images of several requests are decoded in turns, and not for a cancelled request."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from PIL import Image

from serve_app.config.limits import LimitsConfig
from serve_app.gateway import edit_images
from serve_app.gateway.edit_images import with_images
from serve_app.gateway.input_images import InputImage, in_image_thread, read_mask
from serve_app.protocol.params import GenerationParams
from tests.fakes.backend import LIMITS
from tests.gateway.test_edit_models import EDITS
from tests.waiting import wait_until

pytestmark = pytest.mark.anyio

THREADS = 2


class Decoder:
    """Stands in for `read_image`. Waits for its release, and keeps the order of the files."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.released = threading.Event()

    def __call__(self, data: bytes, limits: LimitsConfig, has_mask: bool = False) -> InputImage:
        self.begun.append(data)
        assert self.released.wait(60)
        return InputImage(Image.new("RGB", (64, 64)), (data.decode(),))

    async def wait_for(self, count: int) -> None:
        """Wait until this many files are begun."""
        await asyncio.to_thread(wait_until, lambda: len(self.begun) >= count)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    decoder = Decoder()
    monkeypatch.setattr(edit_images, "read_image", decoder)
    return decoder


Work = Coroutine[Any, Any, tuple[GenerationParams, tuple[str, ...]]]


def work(*files: bytes) -> Work:
    return with_images(GenerationParams("x", 1), files, None, read_mask, EDITS, LIMITS)


async def finish_threads() -> None:
    """Wait until both threads have done all that they were given."""
    meet: Callable[[], int] = threading.Barrier(THREADS).wait
    await asyncio.gather(*(in_image_thread(meet) for _ in range(THREADS)))


async def test_a_small_request_does_not_wait_for_all_images_of_others(decoder: Decoder) -> None:
    large = [asyncio.create_task(work(b"1", b"2", b"3")) for _ in range(THREADS)]
    await decoder.wait_for(THREADS)
    small = asyncio.create_task(work(b"small"))
    await asyncio.sleep(0)  # it is in the queue
    decoder.released.set()
    await asyncio.gather(*large, small)
    assert decoder.begun[:3] == [b"2", b"2", b"small"]
    assert sorted(decoder.begun[3:]) == [b"1", b"1", b"3", b"3"]
    # Warnings have the order of the files.
    assert large[0].result()[1] == ("1", "2", "3")


async def test_a_cancelled_request_decodes_no_more_images(decoder: Decoder) -> None:
    cancelled = asyncio.create_task(work(b"1", b"2", b"3"))
    await decoder.wait_for(1)
    cancelled.cancel()
    with suppress(asyncio.CancelledError):
        await cancelled
    decoder.released.set()
    await finish_threads()
    assert decoder.begun == [b"2"]
