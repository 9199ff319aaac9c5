"""Reward functions that hang, die, chat and refuse. They import little, so that a process starts quickly."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time

Texts = list[str]


def chatty(prompts: object, completions: Texts, **columns: object) -> list[float | None]:
    """Length, and nothing to say about three characters; prints, which must not disturb the answer."""
    print("thinking about", completions)
    return [None if len(text) == 3 else float(len(text)) for text in completions]


def sleeps_when_asked(prompts: object, completions: Texts, **columns: object) -> list[float]:
    if "sleep" in completions:
        subprocess.Popen(["sleep", "86399"])
        time.sleep(86399)
    return [float(len(text)) for text in completions]


def dies_when_asked(prompts: object, completions: Texts, **columns: object) -> list[float]:
    if "die" in completions:
        os._exit(3)
    return [0.0] * len(completions)


def refuses(prompts: object, completions: Texts, **columns: object) -> list[float]:
    raise ValueError("no")


def has_its_own_loop(prompts: object, completions: Texts, **columns: object) -> list[float]:
    """Not async, but it waits for something that is."""

    async def measure(text: str) -> float:
        await asyncio.sleep(0)
        return float(len(text))

    async def all_of_them() -> list[float]:
        return list(await asyncio.gather(*[measure(text) for text in completions]))

    return asyncio.run(all_of_them())


async def fails_on_bad(prompts: object, completions: Texts, **columns: object) -> list[float]:
    if any("bad" in text for text in completions):
        raise ValueError("bad")
    return [1.0] * len(completions)
