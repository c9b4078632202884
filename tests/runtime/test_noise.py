"""The random numbers are Philox's, have the right distributions, and depend on nothing but their key and counter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.runtime.noise import MASK, normal, philox, uniform

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
