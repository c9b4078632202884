"""A film shows each step's tokens, whatever their text, on a self-contained page and on a terminal."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from megatron_sfr.kernels.vocab_parallel import Vocab
from megatron_sfr.kl_flow.sampling.requests import Gap, SampleSpec, canvas, infill
from megatron_sfr.kl_flow.sampling.sampler_options import SamplerOptions
from megatron_sfr.kl_flow.sampling.samplers import sample
from megatron_sfr.kl_flow.sampling.trajectory import MOST_FRAMES, Film, Frame, Recorder, from_json, moving, stills
from megatron_sfr.kl_flow.sampling.trajectory_html import page
from megatron_sfr.kl_flow.sampling.vocab_shard import Shard
from megatron_sfr.kl_flow.simplex_path import Simplex
from tests.kl_flow.sampling.languages import language

TEXTS = {0: "</script><b>", 1: " naïve", 2: "\n", 3: "\x1b[2J", 4: "∎"}


class Words:
    """A tokenizer that decodes by TEXTS."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(TEXTS[token] for token in tokens)


@pytest.fixture
def film() -> Film:
    frames = (Frame(0, 0.0, (2, 3, 4, 4), (10, 20, 90, 90)), Frame(1, 0.3, (1, 0, 2, 4), (99, 60, 40, 90)))
    return Film("a film", (1, 1, 0, 2, 4, 4), 1, 5, frames, TEXTS, end=4)


def test_the_page_contains_the_film_and_no_text_closes_its_script(film: Film) -> None:
    html = page(film)
    assert not re.search(r"(src|href)=|https?://", html)
    actual = json.loads(re.findall(r'id="film">(.*?)</script>', html)[0])
    assert actual | {"title": film.title} == json.loads(json.dumps(asdict(film)))
    assert f"<h1>{film.title}</h1>" in html
    assert html.count("</script>") == 2


def test_stills_show_uncertain_tokens_as_dots(film: Film) -> None:
    assert list(stills(film)) == [
        "step    0  t 0.000   naïve·····∎",  # only one of the end tokens is shown
        "step    1  t 0.300   naïve naïve</script><b>·∎",
    ]


def test_frames_are_redrawn_in_place_and_no_token_moves_the_cursor(film: Film) -> None:
    first, second = moving(film, columns=20)
    plain = [re.sub(r"\x1b\[38;5;\d+m|\x1b\[0m", "", frame) for frame in (first, second)]
    assert plain[0] == "step    0  t 0.000\n naïve⏎ [2J∎\n"
    assert plain[1].startswith("\x1b[2A\r\x1b[Jstep    1")  # one line of text and the header
    assert "\x1b[2J" not in first + second


def test_a_film_is_read_back_from_json(film: Film) -> None:
    assert from_json(json.dumps(asdict(film))) == film


@pytest.mark.parametrize(("steps", "most"), [(4, 5), (1000, MOST_FRAMES)])
def test_a_recorder_keeps_the_first_and_the_last_step_and_certainty_grows(steps: int, most: int) -> None:
    toy, size = language(size=5), 5
    shard, request = Shard(Vocab(size), size), infill([[1], Gap(0, 3), [2]], {})
    recorder = Recorder(shard)
    options = SamplerOptions("basic", steps, t_max=0.8, final_top_k=0)
    area = canvas([SampleSpec(request, 0)], torch.device("cpu"))
    (tokens,) = sample(toy.denoise, area, shard, Simplex(size), options, recorder).tolist()
    made = recorder.film("one", tokens, request, Words())
    assert 1 < len(made.frames) <= most
    assert (made.frames[0].step, made.frames[-1].step) == (0, steps)
    assert made.frames[-1].tokens == tuple(tokens[1:4])
    assert sum(made.frames[-1].percent) > sum(made.frames[0].percent)
