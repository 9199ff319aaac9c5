"""A reference server of rewards: any reward function behind HTTP, for tests and for small set-ups.

    RLHF_RAY_REWARD_TOKEN=… python -m rlhf_ray.rewards.server module:function --port 8001

Binds to loopback and wants the token. docs/reward-server.md describes what is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import os
import sys
from collections.abc import Sequence

import numpy as np
from aiohttp import web

from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.functions import RewardFunction
from rlhf_ray.types import Message

TOKEN_VARIABLE = "RLHF_RAY_REWARD_TOKEN"
LARGEST_REQUEST = 64 << 20


class RewardServer:
    """
    Args:
        token: what a request must carry as `Authorization: Bearer …`.
    """

    def __init__(self, function: RewardFunction, token: str) -> None:
        self.function = function
        self.expected = f"Bearer {token}".encode()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=LARGEST_REQUEST)
        app.router.add_post("/", self.answer)
        return app

    async def answer(self, request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, self.expected):
            return _error(401, "the bearer token is missing or wrong")
        try:
            prompts, completions, columns = _read(await request.json())
        except ValueError as error:
            return _error(400, str(error))
        try:
            rewards = await self.function.rewards(prompts, completions, columns)
        except RewardError as error:
            return _error(500, str(error))
        values = [None if np.isnan(reward) else float(reward) for reward in rewards]
        return web.json_response({"rewards": values})


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


def _read(
    request: object,
) -> tuple[list[tuple[Message, ...]], list[str], list[dict[str, object]]]:
    """Prompts, completions and a dict of columns a row. Raises: ValueError."""
    if not isinstance(request, dict):
        raise ValueError("the request is no object")
    prompts, completions = request.get("prompts"), request.get("completions")
    columns = request.get("columns", {})
    if not isinstance(prompts, list) or not isinstance(completions, list) or not isinstance(columns, dict):
        raise ValueError('"prompts" and "completions" must be lists, and "columns" an object of lists')
    lists = [prompts, *columns.values()]
    if not all(isinstance(entries, list) and len(entries) == len(completions) for entries in lists):
        raise ValueError("prompts, completions and every column must have the same length")
    if not all(isinstance(prompt, list) for prompt in prompts):
        raise ValueError("every prompt must be a list of turns")
    rows = [{name: column[row] for name, column in columns.items()} for row in range(len(completions))]
    return [tuple(prompt) for prompt in prompts], completions, rows


async def serve(server: RewardServer, host: str, port: int) -> None:
    """Until cancelled. port: 0 takes a free one; the address is printed."""
    runner = web.AppRunner(server.app())
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0]
        print(f"serving {server.function.name} at http://{bound[0]}:{bound[1]}/", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.rewards.server", description=__doc__)
    parser.add_argument("function", help="import path module:function")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--token-env", default=TOKEN_VARIABLE, help="environment variable with the token")
    options = parser.parse_args(arguments)
    token = os.environ.get(options.token_env)
    if not token:
        print(f"{options.token_env} is not set: a reward server wants a token", file=sys.stderr)
        return 2
    try:
        server = RewardServer(RewardFunction(options.function, options.function), token)
        asyncio.run(serve(server, options.host, options.port))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--host={options.host} --port={options.port}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
