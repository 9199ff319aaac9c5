"""vLLM as a reward model: one number a sequence, from its last token."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.config.schema import EngineSection
from rlhf_ray.engines.vllm_generator import ENVIRONMENT, on_gpu, shared_arguments
from rlhf_ray.errors import ModelError
from rlhf_ray.types import Ragged


class VLLMScorer:
    """One vLLM engine with all its tensor-parallel workers, around a sequence-classification model of one
    label. Its head is in float32, whatever the rest is.

    Args:
        model_folder: Hugging Face folder. max_length: tokens of a row, at most.
        threads, sleeps: as in `VLLMGenerator`.
    """

    def __init__(
        self, model_folder: str, section: EngineSection, max_length: int, *, threads: int, sleeps: bool
    ) -> None:
        os.environ.update(ENVIRONMENT)
        torch.set_num_threads(threads)
        from vllm import LLM
        from vllm.config import PoolerConfig

        self.max_length = max_length
        self._is_asleep = False
        arguments = shared_arguments(model_folder, section, max_length, seed=0)
        # Its pooling front end asks for a tokenizer, whatever it is sent.
        arguments["skip_tokenizer_init"] = False
        if sleeps and on_gpu():
            arguments["enable_sleep_mode"] = True
        try:
            self._llm = LLM(
                runner="pooling",
                # Scores as they are, without a sigmoid.
                pooler_config=PoolerConfig(task="classify", seq_pooling_type="LAST", use_activation=False),
                **arguments,
            )
        except (ValueError, NotImplementedError) as error:
            raise ModelError(
                f"{model_folder}: vLLM cannot serve it as a reward model ({str(error).strip()}); use "
                "placement.reward.backend: torch"
            ) from error

    def scores(self, sequences: Ragged) -> NDArray[np.float32]:
        """[B] of each row's last token."""
        from vllm import TokensPrompt

        if not len(sequences):
            return np.empty(0, dtype=np.float32)
        rows = [TokensPrompt(prompt_token_ids=row.tolist()) for row in sequences]
        outputs = self._llm.encode(rows, pooling_task="classify", use_tqdm=False)
        return torch.stack([output.outputs.data.float() for output in outputs]).squeeze(-1).cpu().numpy()

    def rest(self) -> None:
        """As `VLLMGenerator.rest`."""
        self._llm.sleep(level=1)
        self._is_asleep = True

    def wake(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
        self._is_asleep = False
