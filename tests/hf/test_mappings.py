"""Parameter mappings are invertible, have transformers' names and shapes, and split where tensor parallelism does."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sfr.hf.families.family_registry import FAMILIES, family_of, megatron_flags
from megatron_sfr.hf.families.fused_weights import FusedQKV
from megatron_sfr.hf.hf_folder import Weights, read_config
from megatron_sfr.hf.mappings import QKV, Dimensions, GatedMLP, entries
from megatron_sfr.hf.megatron.megatron_model import runs_of_rows
from tests.hf.models import CASES, TINY, save_model

ATTENTION = QKV("qkv", ("q", "k", "v"), ("hidden",))
BIAS = QKV("bias", ("q", "k", "v"), ())
ROWS = [ATTENTION, BIAS, FusedQKV("qkv", ("qkv",), ("hidden",)), GatedMLP("fc1", ("gate", "up"))]
sizes = st.integers(1, 4)
dimensions = st.builds(
    lambda groups, shared, head_dim, hidden, ffn: Dimensions(1, 1, hidden, ffn, groups * shared, groups, head_dim),
    *(sizes for _ in range(5)),
)


def parts(row, d):
    """Every number once, so that no two places can be mistaken for each other."""
    start, out = 0, []
    for shape in row.shapes(d):
        n = torch.Size(shape).numel()
        out.append(torch.arange(start, start + n).reshape(shape))
        start += n
    return tuple(out)


@given(dimensions, st.sampled_from(ROWS))
def test_split_undoes_join(d, row):
    original = parts(row, d)
    joined = row.join(original, d)
    assert joined.shape == row.megatron_shape(d)
    for found, wanted in zip(row.split(joined, d), original, strict=True):
        assert torch.equal(found, wanted)


@given(dimensions, st.sampled_from(ROWS))
def test_runs_of_rows_are_what_split_returns(d, row):
    joined = row.join(parts(row, d), d)
    for runs, wanted in zip(runs_of_rows(row, d), row.split(joined, d), strict=True):
        assert torch.equal(torch.cat([joined[a:b] for a, b in runs]), wanted)
        assert all(stop != start for (_, stop), (start, _) in pairwise(runs))


@given(dimensions)
def test_qkv_interleaves_by_group(d):
    q, k, v = parts(ATTENTION, d)
    blocks, shared = [], d.heads // d.groups * d.head_dim
    for g in range(d.groups):
        blocks += [q[g * shared : (g + 1) * shared], *(x[g * d.head_dim : (g + 1) * d.head_dim] for x in (k, v))]
    assert torch.equal(ATTENTION.join((q, k, v), d), torch.cat(blocks))


@given(dimensions, st.sampled_from(ROWS), st.data())
def test_a_span_is_joined_from_spans(d, row, data):
    whole, original, grain = row.join(parts(row, d), d), parts(row, d), row.grain(d)
    start, stop = sorted(data.draw(st.integers(0, len(whole) // grain)) * grain for _ in range(2))
    spans = row.spans(start, stop, d)
    cut = (torch.cat([x[a:b] for a, b in of_part]) for x, of_part in zip(original, spans, strict=True))
    assert torch.equal(row.join(tuple(cut), d), whole[start:stop])


@given(dimensions)
def test_fused_and_separate_qkv_are_one_tensor_in_megatron(d):
    fused = FusedQKV("qkv", ("qkv",), ("hidden",))
    assert torch.equal(fused.join((torch.cat(parts(ATTENTION, d)),), d), ATTENTION.join(parts(ATTENTION, d), d))


@pytest.mark.parametrize("tp", [2, 3, 6])
def test_tensor_parallel_ranks_hold_whole_groups(tp):
    d = Dimensions(1, 1, hidden=5, ffn=4, heads=12, groups=6, head_dim=3)
    whole = parts(ATTENTION, d)
    local = replace(d, heads=d.heads // tp, groups=d.groups // tp)
    shards = [ATTENTION.join(rank, local) for rank in zip(*(x.chunk(tp) for x in whole), strict=True)]
    assert torch.equal(torch.cat(shards, dim=ATTENTION.tp_dim), ATTENTION.join(whole, d))


def test_every_family_has_a_tiny_model():
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
def test_mappings_are_what_transformers_writes(tmp_path, case):
    architecture, changes = CASES[case]
    weights = Weights(save_model(tmp_path, architecture, **changes))
    config = read_config(tmp_path)
    family = family_of(config)
    d = family.dimensions(config)
    found = {
        name: shape
        for entry in entries(family.mappings(config), d)
        for name, shape in zip(entry.names, entry.mapping.shapes(d), strict=True)
    }
    assert found == {name: weights.shape(name) for name in weights.files}


def test_unknown_architectures_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"BertModel: not converted; known: .*Qwen3ForCausalLM"):
        megatron_flags({"architectures": ["BertModel"]})
