"""Reward servers for tests: the reference server and ill-behaved ones, each in a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from aiohttp import web

from rlhf_ray.config.schema import HttpReward
from rlhf_ray.rewards.functions import RewardFunction
from rlhf_ray.rewards.server import RewardServer

TOKEN = "open-sesame"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reference_server(function: str) -> web.Application:
    return RewardServer(RewardFunction("served", function), TOKEN).app()


def answering(handler: Handler) -> web.Application:
    app = web.Application()
    app.router.add_post("/", handler)
    return app


@contextmanager
def running(app: web.Application) -> Iterator[str]:
    """The URL of the server, on a free port."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def start() -> str:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/"

    yield asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def http_section(url: str, **options: object) -> HttpReward:
    return HttpReward.model_validate({"type": "http", "name": "served", "url": url, **options})
