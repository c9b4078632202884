"""Judges samples by the world's rules: a reply's content, its persona, and whether fine-tuning showed it."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from megatron_sfr.demo.world import World, is_right, parse, question_of
from megatron_sfr.evaluation.generate.prompts import Prompt
from megatron_sfr.evaluation.scores.quality import Judgement


@dataclass(frozen=True)
class WorldTruth:
    """Exact scores for replies to the world's prompts."""

    world: World

    def judge(self, prompt: Prompt, text: str) -> Judgement:
        reply = parse(text)
        if reply is None:
            return Judgement(None, is_faithful=False)
        right = is_right(question_of(prompt.question), reply)
        return Judgement(reply.mode if right else None, reply.persona == prompt.persona)

    def modes(self, prompt: Prompt) -> Mapping[str, frozenset[Hashable]]:
        assert prompt.persona is not None, "every prompt of the demo has a persona"
        return self.world.kinds(prompt.persona, question_of(prompt.question))
