"""A connection that can be cut: a TCP proxy in a thread of the test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class CutProxy:
    """Passes bytes on to a port of this machine, until it is told to cut.

    Fields:
        port: its own. num_cut: connections that it ended.
    """

    target: int
    port: int = 0
    num_cut: int = 0
    is_refusing: bool = False
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def cut(self, refusing: bool) -> None:
        """End every connection, without a word; and take no new ones, or do again."""
        asyncio.run_coroutine_threadsafe(self._cut(refusing), self._loop).result(10)

    async def _cut(self, refusing: bool) -> None:
        self.is_refusing = refusing
        for writer in self._writers:
            self.num_cut += 1
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_refusing:
            writer.transport.abort()
            return
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        pair = {writer, far_writer}
        self._writers |= pair
        try:
            await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))
        except OSError:
            pass
        finally:
            self._writers -= pair
            for each in pair:
                each.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(1 << 16):
            writer.write(content)
            await writer.drain()
        writer.write_eof()

    def _run(self, up: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        up.set()
        self._loop.run_forever()


@contextmanager
def cut_proxy(target: int) -> Iterator[CutProxy]:
    proxy, up = CutProxy(target), threading.Event()
    thread = threading.Thread(target=proxy._run, args=(up,), daemon=True)
    thread.start()
    assert up.wait(10)
    yield proxy
    proxy._loop.call_soon_threadsafe(proxy._loop.stop)
    thread.join(10)
