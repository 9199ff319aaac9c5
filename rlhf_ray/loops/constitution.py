"""Critique and revision: the model answers, says by a principle what is wrong with its answer, and writes it
again (Bai et al. 2022, Constitutional AI, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_ray.config.schema import ConstitutionSection
from rlhf_ray.data.chat import ChatFormatter
from rlhf_ray.data.constitution import Constitution, Principle
from rlhf_ray.data.conversations import Turns
from rlhf_ray.loops.parts import Parts
from rlhf_ray.loops.stage_run import StageRun, num_logged
from rlhf_ray.reporting.revisions import (
    Revision,
    RevisionRound,
    read_revisions,
    revision_metrics,
    write_revisions,
)
from rlhf_ray.reporting.run_folder import RunFolder
from rlhf_ray.roles import Generator
from rlhf_ray.seeds import derive_seed
from rlhf_ray.types import Prompts, Ragged, Rollouts, SamplingSpec

SLACK = 64
"""Tokens. What was sampled is rendered anew in the next turn, and may then take more tokens."""


@dataclass(frozen=True)
class RevisionLoop:
    """Answers every prompt `num_generations` times, and revises each answer `num_rounds` times.

    A revision takes the place of the answer in the next round. A file a step keeps what was said, so that a
    stopped run can go on.

    Fields:
        max_model_len: tokens that the engine takes.
    """

    section: ConstitutionSection
    constitution: Constitution
    generator: Generator
    formatter: ChatFormatter
    prompts: Prompts
    max_model_len: int
    run: StageRun

    def __call__(self) -> list[Revision]:
        run, parts = self.run, self.parts
        parts.check_same_origin()
        # A run may have been cut off between the file of a step and its metrics, which are then made of it.
        start = min(len(parts.done()), num_logged(run.folder))
        run.begin(start, len(parts))
        for step, rows in parts.left(start):
            if parts.path(step).exists():
                revisions = read_revisions(parts.path(step))
            else:
                revisions = self.revise(self.prompts.select(rows))
                write_revisions(parts.path(step), revisions)
            run.log(step, revision_metrics(revisions))
            run.stop_if_asked(step + 1)
        return read_all(parts)

    @property
    def parts(self) -> Parts:
        return revision_parts(self.section, self.run.folder, self.prompts, self.constitution)

    def revise(self, prompts: Prompts) -> list[Revision]:
        section = self.section
        drafts = [
            Revision(int(prompt_id), sample_id, messages)
            for prompt_id, messages in zip(prompts.ids, prompts.messages, strict=True)
            for sample_id in range(section.num_generations)
        ]
        drafts = self._turn(drafts, lambda draft: draft.prompt, _answered, section.max_completion_length, 0)
        for number in range(section.num_rounds):
            drafts = [self._with_principle(draft, number) for draft in drafts]
            drafts = self._turn(
                drafts, self._critique_request, _criticised, section.max_critique_length, 2 * number + 1
            )
            drafts = self._turn(
                drafts, self._revision_request, _revised, section.max_completion_length, 2 * number + 2
            )
        return [draft.closed() for draft in drafts]

    def principle_for(self, draft: Revision, number: int) -> Principle:
        """Drawn at random for each answer and round, whatever is batched with it."""
        seed = derive_seed(self.run.seed, draft.prompt_id, draft.sample_id, number)
        return self.constitution.principles[
            int(np.random.default_rng(seed).integers(len(self.constitution.principles)))
        ]

    def _with_principle(self, draft: Revision, number: int) -> Revision:
        if draft.outcome is not None:
            return draft
        begun = RevisionRound(self.principle_for(draft, number).id)
        return replace(draft, rounds=(*draft.rounds, begun))

    def _critique_request(self, draft: Revision) -> Turns:
        principle = self.constitution[draft.rounds[-1].principle]
        return self.constitution.critique_messages(principle, draft.prompt, draft.final)

    def _revision_request(self, draft: Revision) -> Turns:
        now = draft.rounds[-1]
        return self.constitution.revision_messages(
            self.constitution[now.principle], draft.prompt, draft.final, now.critique
        )

    def _turn(
        self,
        drafts: Sequence[Revision],
        request: Callable[[Revision], Turns],
        heard: Callable[[Revision, str, bool], Revision],
        max_length: int,
        number: int,
    ) -> list[Revision]:
        """Let the model speak once in every conversation that is still on its way.

        Args:
            request: the conversation that it answers. heard: the draft with what it said, and whether that
                ended by itself. max_length: tokens that it may say. number: of the turn.
        """
        drafts = list(drafts)
        asked: list[int] = []
        tokens: list[list[int]] = []
        for index, draft in enumerate(drafts):
            if draft.outcome is not None:
                continue
            ids = self.formatter.prompt_ids(request(draft))
            if len(ids) + max_length > self.max_model_len:
                drafts[index] = replace(draft, outcome="too long")
                continue
            asked.append(index)
            tokens.append(ids)
        if not asked:
            return drafts
        answers = self._sample([drafts[index] for index in asked], tokens, max_length, number)
        for index, response, finished in zip(asked, answers.responses, answers.finished, strict=True):
            text = self.formatter.answer_text(response.tolist()).strip()
            said = heard(drafts[index], text, bool(finished))
            drafts[index] = said if text else replace(said, outcome="empty")
        return drafts

    def _sample(
        self, drafts: Sequence[Revision], tokens: list[list[int]], max_length: int, number: int
    ) -> Rollouts:
        section = self.section
        prompts = Prompts(
            # Every draft samples with a seed of its own.
            ids=np.asarray([d.prompt_id * section.num_generations + d.sample_id for d in drafts]),
            messages=tuple(draft.prompt for draft in drafts),
            token_ids=Ragged.from_rows(tokens, np.int32),
            columns=tuple({} for _ in drafts),
        )
        sampling = SamplingSpec(max_length, temperature=section.temperature, top_p=section.top_p)
        chunks = self.generator.generate(prompts, sampling, derive_seed(self.run.seed, number))
        return Rollouts.concat([chunk.result() for chunk in chunks])


def revision_parts(
    section: ConstitutionSection, folder: RunFolder, prompts: Prompts, constitution: Constitution
) -> Parts:
    principles = {"the constitution": constitution.fingerprint}
    return Parts(folder.rollouts, "revisions", prompts, section.prompts_per_step, principles)


def read_all(parts: Parts) -> list[Revision]:
    return [revision for part in parts.done() for revision in read_revisions(part)]


def longest_conversation(
    section: ConstitutionSection, constitution: Constitution, formatter: ChatFormatter, prompts: Prompts
) -> int:
    """Tokens that an engine must take for any critique and revision."""
    principle = max(constitution.principles, key=lambda p: len(p.critique) + len(p.revision))
    without = max(
        len(formatter.prompt_ids(constitution.revision_messages(principle, messages, "", "")))
        for messages in prompts.messages
    )
    return without + 2 * section.max_completion_length + section.max_critique_length + SLACK


def _answered(draft: Revision, text: str, finished: bool) -> Revision:
    return replace(draft, answer=text, finished=finished)


def _criticised(draft: Revision, text: str, finished: bool) -> Revision:
    return replace(draft, rounds=(*draft.rounds[:-1], replace(draft.rounds[-1], critique=text)))


def _revised(draft: Revision, text: str, finished: bool) -> Revision:
    now = replace(draft.rounds[-1], revision=text)
    return replace(draft, rounds=(*draft.rounds[:-1], now), finished=finished)
