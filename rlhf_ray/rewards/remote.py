"""Rewards over HTTP; docs/reward-server.md describes what is sent."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from rlhf_ray.config.schema import HttpReward
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.source import Samples, Values, as_lists, checked

REFUSALS = {
    401: "it wants a token",
    403: "it refuses the token",
    404: "there is nothing at that path",
    405: "it takes no POST at that path",
}
"""Statuses that no later attempt would change."""


class HttpSource:
    """One POST a batch, at most `max_concurrency` at the same time.

    Args:
        token: sent as `Authorization: Bearer …`.
    """

    def __init__(self, section: HttpReward, token: SecretStr | None) -> None:
        self.section = section
        self.headers = {"Content-Type": "application/json"}
        self.token = token
        if token is not None:
            self.headers["Authorization"] = f"Bearer {token.get_secret_value()}"
        self.slots = asyncio.Semaphore(section.max_concurrency)

    async def score(self, samples: Samples) -> Values:
        request = {
            "prompts": samples.prompts,
            "completions": samples.completions,
            "columns": as_lists(samples.rollouts.columns),
        }
        # Dates and the like, which JSON lacks, go as text.
        body = json.dumps(request, default=str)
        async with self.slots:
            status, text = await self._post(body)
        return Values(self._rewards(status, text, len(samples)))

    async def _post(self, body: str) -> tuple[int, str]:
        limit = aiohttp.ClientTimeout(total=self.section.timeout)
        try:
            async with (
                aiohttp.ClientSession(timeout=limit) as session,
                # A redirect would carry the token elsewhere.
                session.post(
                    self.section.url, data=body, headers=self.headers, allow_redirects=False
                ) as response,
            ):
                return response.status, await response.text(errors="replace")
        except TimeoutError as error:
            raise self._failure(f"did not answer within timeout={self.section.timeout:g} s") from error
        except aiohttp.ClientError as error:
            raise self._failure(f"cannot be asked: {error}") from error

    def _rewards(self, status: int, text: str, count: int) -> NDArray[np.float32]:
        if status in REFUSALS:
            remedy = "correct url, or the token in the variable that token_env names"
            raise ConfigError(f"{self._where} answers {status}: {REFUSALS[status]}; {remedy}")
        if status != 200:
            raise self._failure(f"answered {status}: {text[:200]}")
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise self._failure(f"answered no JSON: {text[:200]}") from error
        if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
            raise self._failure(f'answered without a list "rewards": {text[:200]}')
        if any(isinstance(reward, str | bool) for reward in answer["rewards"]):
            raise self._failure(f"answered with a reward that is neither a number nor null: {text[:200]}")
        return checked(self.section.name, answer["rewards"], count)

    @property
    def _where(self) -> str:
        return f"reward '{self.section.name}': the server at {self.section.url}"

    def _failure(self, what: str) -> RewardError:
        """A server may repeat what it was sent."""
        token = self.token.get_secret_value() if self.token else ""
        return RewardError(f"{self._where} {what.replace(token, '***') if token else what}")

    def close(self) -> None:
        pass
