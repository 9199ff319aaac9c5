"""Feedback models of the preferences stage: in the engine that answers, or in engines of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.group import ActorGroup
from actors.roles import RemoteGenerator
from launch.placement import Placement, RoleDemand
from launch.stages.context import StageContext
from launch.stages.generation import build_engines, demand_engine
from rlhf_ray.config.schema import ConstitutionAnnotator, ModelSection, PreferencesSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import Constitution, load_constitution
from rlhf_ray.models.loading import max_model_length
from rlhf_ray.types import Prompts
from rlhf_ray.workers.feedback import FeedbackAnnotator, longest_question

ENGINE = "engine"


@dataclass(frozen=True)
class FeedbackModel:
    """
    Fields:
        role: whose engines it runs in. max_model_len: tokens that they must take.
    """

    section: ConstitutionAnnotator
    constitution: Constitution
    model: ModelSection
    formatter: ChatFormatter
    role: str
    max_model_len: int

    def demand(self, context: StageContext) -> RoleDemand:
        return demand_engine(context, self.model, self.role, context.config.placement.feedback)

    def start(self, context: StageContext, placement: Placement, engines: ActorGroup) -> RemoteGenerator:
        """
        Args:
            engines: those that answer.
        """
        if self.role == ENGINE:
            return RemoteGenerator(engines)
        group = placement.start(self.role)
        build_engines(context, placement, group, self.model, self.max_model_len, version=0)
        return RemoteGenerator(group)

    def annotator(self, engine: RemoteGenerator, max_model_len: int, seed: int) -> FeedbackAnnotator:
        """
        Args:
            max_model_len: tokens that the engine takes.
        """
        return FeedbackAnnotator(self.section, self.constitution, self.formatter, engine, max_model_len, seed)


def feedback_models(
    context: StageContext, section: PreferencesSection, answering: ModelSection, prompts: Prompts
) -> list[FeedbackModel]:
    """Args: answering: the model whose answers are compared."""
    found = []
    for annotator in section.annotators:
        if not isinstance(annotator, ConstitutionAnnotator):
            continue
        model = answering
        if annotator.model is not None:
            model = context.model(f"feedback:{annotator.name}", annotator.model)
        constitution = load_constitution(annotator.principles)
        context.data[constitution.source] = constitution.fingerprint
        formatter = context.formatter(model)
        longest = longest_question(constitution, formatter, prompts, section.max_completion_length)
        role = f"feedback-{annotator.name}" if annotator.model is not None else ENGINE
        max_model_len = min(longest, max_model_length(model))
        found.append(FeedbackModel(annotator, constitution, model, formatter, role, max_model_len))
    return found


def shared_length(models: Sequence[FeedbackModel]) -> int:
    """Tokens that the engine which answers must take for the feedback models that share it."""
    return max((model.max_model_len for model in models if model.role == ENGINE), default=0)
