"""The random numbers are Philox's, have the right distributions, and depend on nothing but their key and counter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.runtime.noise import MASK, PIECE, normal, philox, uniform, uniforms

# Known answers of Random123's kat_vectors for philox4x32-10: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter: tuple, key: int, expected: tuple) -> None:
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


def test_normals_are_normal_and_uniforms_uniform() -> None:
    sample, zero = torch.arange(50_000), torch.tensor(0)
    z = normal(7, sample, zero, zero, 6, stream=0).double()
    assert z.mean(0).abs().max() < 0.02
    assert (z.T @ z / len(z) - torch.eye(6)).abs().max() < 0.03
    assert (z**4).mean() == pytest.approx(3.0, abs=0.1)
    u = uniform(7, sample, zero, zero, stream=0).double()
    assert u.min() > 0
    assert u.max() < 1
    assert (u.sort().values - (torch.arange(50_000) + 0.5) / 50_000).abs().max() < 0.01  # Kolmogorov-Smirnov


@given(st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 1000), st.integers(1, 9))
def test_a_vector_is_the_same_alone_in_a_batch_and_under_a_larger_dim(s: int, p: int, k: int, dim: int) -> None:
    alone = normal(3, torch.tensor(s), torch.tensor(p), torch.tensor(k), dim, stream=1)
    batch = normal(3, torch.tensor([[5], [s]]), torch.tensor([p, 11]), torch.tensor(k), dim + 3, stream=1)
    assert torch.equal(alone, batch[1, 0, :dim])


def test_every_key_matters() -> None:
    def draw(seed: int = 1, s: int = 2, p: int = 3, k: int = 4, stream: int = 0) -> torch.Tensor:
        return normal(seed, torch.tensor(s), torch.tensor(p), torch.tensor(k), 8, stream=stream)

    others = [draw(seed=2), draw(s=3), draw(s=2 + 2**32), draw(p=4), draw(k=5), draw(stream=1), draw(seed=1 + 2**32)]
    assert not any(torch.equal(draw(), other) for other in others)


@given(st.integers(0, 2**40), st.integers(1, 12), st.integers(1, 40), st.integers(1, 3))
def test_shards_of_a_vector_fit_together(s: int, blocks: int, rest: int, rows: int) -> None:
    """Also where a shard is drawn in pieces, alone or with others."""
    sample, position, draw = torch.full((rows, 1), s), torch.tensor([3, 5]), torch.tensor(0)
    whole = uniforms(3, sample, position, draw, 4 * blocks + rest, stream=1)
    second = uniforms(3, sample, position, draw, rest, start=4 * blocks, stream=1)
    assert torch.equal(whole[..., 4 * blocks :], second)
    alone = uniforms(3, torch.tensor(s), torch.tensor(5), draw, 4 * blocks, stream=1)
    assert torch.equal(whole[-1, 1, : 4 * blocks], alone)


def test_pieces_of_a_long_vector_fit_together() -> None:
    key = (torch.arange(3), torch.tensor(1), torch.tensor(2))
    whole = uniforms(5, *key, PIECE // 2 + 7, stream=0)
    ends = PIECE // 3 // 4 * 4  # where the first piece of three rows ends
    for start in (0, 4, ends - 4, ends, PIECE // 2):
        part = uniforms(5, *key, 7, start=start, stream=0)
        assert torch.equal(whole[:, start : start + 7], part)


def test_many_uniforms_are_uniform_and_their_logarithms_exponential() -> None:
    u = uniforms(7, torch.arange(2000), torch.tensor(0), torch.tensor(0), 50, stream=0).double()
    assert u.min() > 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.003)
    assert u.var() == pytest.approx(1 / 12, rel=0.01)
    assert torch.corrcoef(u.T).fill_diagonal_(0).abs().max() < 0.12
    e = (-u.log()).flatten().sort().values
    law = 1 - (-e).exp()
    assert (law - (torch.arange(len(e)) + 0.5) / len(e)).abs().max() < 0.006  # Kolmogorov-Smirnov
    assert e.mean() == pytest.approx(1, abs=0.01)
    assert e.var() == pytest.approx(1, rel=0.03)


def test_a_shard_starts_where_a_block_does() -> None:
    with pytest.raises(ValueError, match="a shard starts at a multiple of 4"):
        uniforms(1, torch.tensor(0), torch.tensor(0), torch.tensor(0), 8, start=6, stream=0)


def test_the_fused_philox_gives_the_same_words() -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__).with_name("philox_in_triton.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["0"] * 5, done.stdout


@pytest.mark.gpu
def test_a_gpu_draws_the_same_noise() -> None:
    keys = (torch.arange(3)[:, None], torch.arange(400), torch.tensor(2))
    there = [x.cuda() for x in keys]
    torch.testing.assert_close(uniform(7, *there, stream=1).cpu(), uniform(7, *keys, stream=1), rtol=0, atol=0)
    # Sine, cosine and logarithm differ in their last bits.
    torch.testing.assert_close(
        normal(7, *there, 5, stream=0).cpu(), normal(7, *keys, 5, stream=0), rtol=1e-5, atol=1e-5
    )
