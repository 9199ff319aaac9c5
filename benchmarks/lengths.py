"""Lengths in tokens as they were recorded: of the first 64 of `embedded:prompts`, shuffled by seed 0, those
whose answer by SmolLM2-135M-Instruct at temperature 0.3 came to an end by itself within 1024 tokens, and of
these answers. Half of them have fewer than 235 tokens, a tenth more than 376 and one 795: the long tail for
which an engine waits.
"""

from __future__ import annotations

# fmt: off
ANSWERS = (
    24, 274, 311, 58, 795, 373, 45, 222, 162, 53, 265, 81, 170, 37, 107, 292, 180, 415, 322, 18, 278, 218,
    264, 152, 219, 248, 308, 392, 376, 301, 138, 77, 343, 208, 78, 329, 399, 245, 141, 296,
)

PROMPTS = (
    41, 41, 37, 38, 39, 39, 43, 38, 41, 38, 39, 39, 40, 42, 37, 40, 52, 42, 41, 43, 50, 40, 42, 41, 41, 43,
    50, 44, 42, 38, 41, 42, 40, 40, 53, 39, 44, 40, 40, 37,
)
# fmt: on
