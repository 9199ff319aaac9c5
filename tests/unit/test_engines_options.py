"""Choosing between given continuations, against sums that are made by hand and by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_ray.engines.options import choice_probabilities, option_logprobs
from rlhf_ray.types import Ragged
from tests.fakes import HandFedGenerator
from tests.tiny import tiny_model_folder


def minus_tenth_of_the_token(sequences: Ragged) -> Ragged:
    return Ragged.from_rows([-np.asarray(row[1:]) / 10 for row in sequences], np.float32)


def test_sums_the_tokens_of_each_option_alone() -> None:
    found = option_logprobs(minus_tenth_of_the_token, [[5, 6], [7]], [[1], [2, 3]])
    np.testing.assert_allclose(found, [[-0.1, -0.5], [-0.1, -0.5]], rtol=1e-6)


def test_no_prefix_asks_nothing() -> None:
    def refuse(sequences: Ragged) -> Ragged:
        raise AssertionError("nothing to ask")

    assert option_logprobs(refuse, [], [[1], [2]]).shape == (0, 2)


def test_probabilities_are_of_the_options_alone() -> None:
    logprobs = np.log([[0.2, 0.05], [1e-300, 3e-300]])
    np.testing.assert_allclose(choice_probabilities(logprobs), [[0.8, 0.2], [0.25, 0.75]], rtol=1e-9)


def test_an_engine_agrees_with_transformers(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "tiny")
    engine = HandFedGenerator(folder, version=0)
    prefixes, options = [[1, 30, 41], [1, 99]], [[50], [51, 60], [50, 2]]
    found = option_logprobs(engine.token_logprobs, prefixes, options)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for n, prefix in enumerate(prefixes):
        for k, option in enumerate(options):
            ids = list(prefix)
            expected = 0.0
            for token in option:
                with torch.no_grad():
                    expected += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
                ids.append(token)
            assert found[n, k] == pytest.approx(expected, abs=1e-4)
