"""What is asked becomes rows with free positions, in batches of one length, and what was found is cut at its end."""

import torch

from megatron_sfr.simplex_sampling.requests import (
    KEYS,
    Request,
    Wanted,
    batches,
    blank,
    canvas,
    gap,
    reply,
    whole_batches,
)


def test_a_reply_ends_before_the_end_token_and_the_row_after_the_longest_reply() -> None:
    request = reply([7, 8], 9, longest=4, end=3, key=5, told={})
    assert request.tokens == (7, 8, *(3,) * 7)
    area = canvas([Wanted(request, 0)], torch.device("cpu"))
    assert area.free_BS.tolist() == [[False] * 2 + [True] * 4 + [False] * 3]
    assert request.found([7, 8, 1, 2, 3, 3, 3, 3, 3]) == ([1, 2], True)
    assert request.found([7, 8, 1, 2, 2, 1, 3, 3, 3]) == ([1, 2, 2, 1], False)
    assert canvas([Wanted(reply([7], 9, None, 3, 5, {}), 0)], torch.device("cpu")).free_BS.sum() == 8


def test_a_gap_lies_between_its_texts_and_keeps_what_looks_like_an_end() -> None:
    request = gap([1, 2], 3, [4], {})
    assert canvas([Wanted(request, 0)], torch.device("cpu")).free_BS.tolist() == [[False] * 2 + [True] * 3 + [False]]
    assert request.found([1, 2, 9, 0, 9, 4]) == ([9, 0, 9], True)


def test_noise_is_named_by_what_is_asked_and_the_sample() -> None:
    numbers = {
        int(canvas([Wanted(request, sample)], torch.device("cpu")).sample_B[0])
        for request in (blank(4), gap([1], 2, [3], {}), gap([1], 3, [3], {}), gap([1, 3], 2, [], {}))
        for sample in range(3)
    }
    assert len(numbers) == 12
    last = Request((1,), 0, 1, key=KEYS - 1)
    assert canvas([Wanted(last, 1)], torch.device("cpu")).sample_B.tolist() == [0]


def test_batches_have_rows_of_one_length_and_a_cut_keeps_whole_ones() -> None:
    found = batches([blank(5), blank(3), blank(5)], samples=2, size=3)
    assert [[len(wanted.request.tokens) for wanted in batch] for batch in found] == [[3, 3], [5, 5, 5], [5]]
    assert [whole_batches(found, lines) for lines in range(7)] == [0, 0, 2, 2, 2, 5, 6]
