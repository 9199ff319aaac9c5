"""`rlhf-ray generate`: one answer of a model, to look at it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from launch.commands.shared import AddCommand, positive
from launch.exit_codes import DONE

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from rlhf_ray.config.schema import ModelSection


def add(command: AddCommand) -> None:
    generate = command("generate", _generate, "Ask a model one question.")
    generate.add_argument(
        "model", metavar="MODEL", help="a model folder, a .gguf file, or the embedded model"
    )
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-completion-length", type=positive, default=128, metavar="TOKENS")
    generate.add_argument("--temperature", type=_temperature, default=0.7, help="0 takes the likeliest token")
    generate.add_argument("--seed", type=int, default=0)


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0")
    return number


def _generate(arguments: argparse.Namespace) -> int:
    from rlhf_ray.config.model_checks import path_mistakes
    from rlhf_ray.config.schema import ModelSection
    from rlhf_ray.errors import ModelError

    mistakes = list(path_mistakes(arguments.model, "language"))
    if mistakes:
        raise ModelError(f"model={arguments.model}: {'; '.join(mistakes)}")
    print(_answer(ModelSection(path=arguments.model), arguments))
    return DONE


def _answer(section: ModelSection, arguments: argparse.Namespace) -> str:
    import torch
    from transformers import GenerationConfig
    from transformers.utils import logging

    from rlhf_ray.models.loading import eos_token_ids, load_policy_model, load_tokenizer

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(section)
    model = load_policy_model(section)
    conversation = [{"role": "user", "content": arguments.prompt}]
    inputs = cast(
        "BatchEncoding",
        tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ),
    )
    sampling = {"temperature": arguments.temperature, "top_k": 0} if arguments.temperature else {}
    ends = list(eos_token_ids(section, tokenizer))
    torch.manual_seed(arguments.seed)
    # transformers types `generate` as a tensor, since modules may have attributes of any kind.
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    output = generate(
        **inputs,
        use_cache=True,
        generation_config=GenerationConfig(
            max_new_tokens=arguments.max_completion_length,
            do_sample=bool(sampling),
            eos_token_id=ends,
            pad_token_id=ends[0],
            **sampling,
        ),
    )
    prompt_length = inputs["input_ids"].shape[1]
    return str(tokenizer.decode(output[0, prompt_length:], skip_special_tokens=True)).strip()
