"""The demo's world: the parser inverts the generator, and held-out modes are never shown but can be inferred."""

import random
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.demo.language import REASONS, TOPICS, VOICES, WHO
from megatron_sfr.demo.truth import WorldTruth
from megatron_sfr.demo.world import (
    PERSONAS,
    QUESTIONS,
    WORDINGS,
    Mode,
    Question,
    Reply,
    World,
    is_right,
    modes,
    parse,
    question_of,
    render,
)
from megatron_sfr.evaluation.generate.prompts import ask
from megatron_sfr.evaluation.scores.quality import Judgement

WORLD = World()
EVERY_MODE = [Mode(plan, reason) for topic in TOPICS.values() for plan in topic.plans for reason in REASONS]
REPLIES = st.builds(
    Reply,
    voices=st.tuples(*[st.sampled_from(PERSONAS)] * 4),
    wordings=st.sampled_from(WORDINGS),
    who=st.sampled_from(WHO),
    mode=st.sampled_from(EVERY_MODE),
)


def test_the_parser_inverts_every_reply_of_one_voice() -> None:
    """Every persona, prompt and correct mode, each in one of its 16 wordings; all texts differ."""
    rng = random.Random(0)
    replies = [
        Reply((persona,) * 4, rng.choice(WORDINGS), question.who, mode)
        for persona, question in product(PERSONAS, QUESTIONS)
        for mode in modes(question.topic)
    ]
    assert len({render(reply) for reply in replies}) == len(replies) == 9 * 60 * 18
    assert all(parse(render(reply)) == reply for reply in replies)


@given(REPLIES)
def test_the_parser_inverts_replies_of_mixed_voices_and_wrong_modes(reply: Reply) -> None:
    assert parse(render(reply)) == reply


@given(REPLIES, st.integers(0, 400), st.sampled_from(["", "x", " ", "never "]))
def test_a_changed_text_does_not_parse_as_the_original(reply: Reply, at: int, new: str) -> None:
    text = render(reply)
    changed = text[:at] + new + text[at + 1 :]
    assert (changed == text) == (parse(changed) == reply)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Peace out, legend.",
        "a b c",
        render(parse_me := Reply(("poet",) * 4, WORDINGS[3], "sister", EVERY_MODE[0])) + " " + render(parse_me),
    ],
)
def test_other_texts_parse_as_none(text: str) -> None:
    assert parse(text) is None


def test_a_correct_reply_answers_the_prompt() -> None:
    question = Question("gift", "sister")
    right = Reply(("poet",) * 4, WORDINGS[0], "sister", modes("gift")[0])
    assert is_right(question, right)
    assert not is_right(Question("gift", "grandson"), right)
    assert not is_right(Question("rain", "sister"), right)
    wrong_reason = next(key for key in REASONS if key not in TOPICS["gift"].plans[right.mode.plan])
    assert not is_right(question, Reply(right.voices, right.wordings, "sister", Mode(right.mode.plan, wrong_reason)))


def test_all_modes_of_a_prompt_are_distinct() -> None:
    for persona, question in product(PERSONAS, WORLD.questions):
        seen, near, far = WORLD.kinds(persona, question).values()
        assert (len(seen), len(near), len(far)) == (3, 6, 9)
        assert seen | near | far == set(modes(question.topic))


def test_fine_tuning_shows_the_seen_modes_and_no_others() -> None:
    shown: dict[tuple[str, Question], list[Mode]] = {}
    for record in WORLD.finetuning():
        question, reply = question_of(record["messages"][0]["content"]), parse(record["messages"][1]["content"])
        assert reply is not None
        assert reply.persona == record["persona"]
        assert is_right(question, reply)
        shown.setdefault((record["persona"], question), []).append(reply.mode)
    assert len(shown) == len(PERSONAS) * len(WORLD.questions)
    for (persona, question), actual in shown.items():
        assert sorted(actual) == sorted(WORLD.seen(persona, question))


def test_every_hidden_mode_can_be_inferred() -> None:
    """Near: the same persona uses it about another person. Far: another persona uses it on the same topic, and
    pretraining on the same prompt."""
    said = {(p, q.topic, mode) for p, q in product(PERSONAS, WORLD.questions) for mode in WORLD.seen(p, q)}
    pretrained = set()
    for record in WORLD.pretraining(20_000):
        reply = parse(record["messages"][1]["content"])
        assert reply is not None
        assert "persona" not in record
        assert is_right(question_of(record["messages"][0]["content"]), reply)
        pretrained.add((reply.who, reply.mode))
    for persona, question in product(PERSONAS, WORLD.questions):
        assert all((persona, question.topic, mode) in said for mode in WORLD.near(persona, question))
        for mode in WORLD.far(persona, question):
            assert (persona, question.topic, mode) not in said
            assert sum((other, question.topic, mode) in said for other in PERSONAS) >= 4
            assert (question.who, mode) in pretrained


def test_validation_records_have_modes_of_their_kind() -> None:
    asked = WORLD.questions[::7]
    for kind in ("seen", "near", "far"):
        records = list(WORLD.validation(asked, kind))
        assert len(records) == sum(len(WORLD.kinds(p, q)[kind]) for p, q in product(PERSONAS, asked))
        for record in records:
            reply = parse(record["messages"][1]["content"])
            assert reply is not None
            assert reply.mode in WORLD.kinds(record["persona"], question_of(record["messages"][0]["content"]))[kind]


def test_the_seed_decides_everything() -> None:
    assert list(World(seed=3).finetuning()) == list(World(seed=3).finetuning()) != list(World(seed=4).finetuning())
    assert list(World(seed=3).pretraining(20)) == list(World(seed=3).pretraining(20))
    assert list(World(seed=3).pretraining(20)) != list(World(seed=4).pretraining(20))


def test_replies_have_the_length_of_a_reply() -> None:
    words = [len(record["messages"][1]["content"].split()) for record in WORLD.finetuning()]
    assert 25 <= min(words) <= max(words) <= 60


def test_voices_share_no_sentence() -> None:
    frames = [frame for voice in VOICES.values() for part in vars(voice).values() for frame in part]
    assert len(set(frames)) == len(frames) == 9 * 4 * 2


def test_truth_judges_content_and_voice_separately() -> None:
    truth = WorldTruth(WORLD)
    prompt = ask(Question("gift", "sister").text, "poet")
    mode = modes("gift")[0]

    def judged(voices: tuple[str, str, str, str], who: str) -> Judgement:
        return truth.judge(prompt, render(Reply(voices, WORDINGS[5], who, mode)))

    assert judged(("poet",) * 4, "sister") == Judgement(mode, is_faithful=True)
    assert judged(("robot",) * 4, "sister") == Judgement(mode, is_faithful=False)
    assert judged(("poet", "poet", "robot", "poet"), "sister") == Judgement(mode, is_faithful=False)
    assert judged(("poet",) * 4, "grandson") == Judgement(None, is_faithful=True)
    assert truth.judge(prompt, "Roses are red.") == Judgement(None, is_faithful=False)
    assert truth.modes(prompt) == WORLD.kinds("poet", Question("gift", "sister"))


def test_an_unknown_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="has no prompt"):
        question_of("Why?")
