"""An export holds the model and nothing else: every tensor is mapped, declared the head's, or refused by name."""

import argparse
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sfr.hf.end_tokens import GENERATION, end_tokens_of
from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.hf_folder import CONFIG, INDEX, RECORD, Weights
from megatron_sfr.hf.import_hf import import_hf
from megatron_sfr.hf.megatron.megatron_checkpoint import COMMON, Checkpoint, Chunk, write_checkpoint
from tests import warm
from tests.hf.models import CASES, save_model


def rewrite(source, target, *, without=(), add=None, objects=None, pad=0):
    """A checkpoint made from another: tensors left out or added, the vocabulary padded."""
    checkpoint = Checkpoint(source)
    tensors = {
        key: checkpoint.read(key, [0] * len(stored.size), stored.size)
        for key, stored in checkpoint.tensors.items()
        if key not in without
    } | (add or {})
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key] = torch.cat([tensors[key], torch.full((pad, tensors[key].shape[1]), torch.nan)])
    chunks = [
        Chunk(key, tuple(x.shape), x.dtype, (0,) * x.ndim, tuple(x.shape), lambda x=x: x) for key, x in tensors.items()
    ]
    write_checkpoint(target, chunks, objects or {})
    return target


@pytest.fixture
def release(imported):
    return imported / "release"


def exported(checkpoint, output, like, **options):
    return export_hf(checkpoint, output, like=like, progress=False, **options)


def test_transformers_loads_it_and_computes_the_same(imported, untied, tmp_path):
    exported(imported, tmp_path / "out", untied, shard_bytes=100_000)
    found, wanted = (AutoModelForCausalLM.from_pretrained(x) for x in (tmp_path / "out", untied))
    tokens = torch.arange(40)[None] * 12
    assert torch.equal(found(tokens).logits, wanted(tokens).logits)
    assert found.generation_config.temperature == 0.7


@pytest.mark.parametrize("named", [True, False])
def test_the_token_that_ended_replies_in_training_becomes_an_end_token(release, untied, tmp_path, named):
    like = shutil.copytree(untied, tmp_path / "like")
    config = json.loads((like / CONFIG).read_text())
    (like / CONFIG).write_text(json.dumps(config | {"eos_token_id": 2, "bos_token_id": 1}))
    if not named:
        (like / GENERATION).unlink()
    else:
        (like / GENERATION).write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.7}))
    known = [2, 3] if named else [2]
    for ids in ([7], [2], None):
        common = {"args": argparse.Namespace(reply_end_tokens=ids)} if ids else {}
        source = rewrite(release, tmp_path / f"checkpoint {ids}", objects={COMMON: common})
        report = exported(source, tmp_path / f"out {ids}", like)
        added = [7] if ids == [7] else []
        assert report.end_tokens == tuple(added)
        assert end_tokens_of(report.output) == (*known, *added)
        if not added:
            assert (report.output / GENERATION).exists() is named
            assert json.loads((report.output / CONFIG).read_text())["eos_token_id"] == 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out [7]")
    assert found.generation_config.eos_token_id == [*known, 7]
    assert found.config.eos_token_id == [2, 7]
    assert found.generation_config.bos_token_id == (None if named else 1)


def test_shards_are_filled_up_to_their_size_and_indexed(imported, untied, tmp_path):
    report = exported(imported, tmp_path / "out", untied, shard_bytes=100_000)
    assert report.files == tuple(f"model-{i + 1:05d}-of-00004.safetensors" for i in range(4))
    assert all((tmp_path / "out" / file).stat().st_size < 110_000 for file in report.files)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert (
        index["metadata"]["total_size"] == report.bytes == sum(Weights(untied)[x].nbytes for x in index["weight_map"])
    )


def test_weights_and_config_have_the_same_permissions(imported, untied, tmp_path):
    exported(imported, tmp_path / "out", untied)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / CONFIG).stat().st_mode


def test_head_and_training_state_are_not_exported(release, untied, tmp_path):
    head = {"flow_head.net.output.weight": torch.ones(3, 2), "flow_head.state.ratio": torch.ones(1)}
    head |= {"flow_head.ema.output.weight": torch.ones(3, 2), "mtp.layers.0.eh_proj.weight": torch.ones(2, 4)}
    bucket = "gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param"
    state = {
        "optimizer.state.exp_avg.output_layer.weight": torch.ones(2),
        f"optimizer.distributed.dp_group_idx_0.{bucket}": torch.ones(2),
        "chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(2),
    }
    objects = {
        "rng_state/shard_0.0_1.1": None,
        "rerun_state_machine_state/shard_0_1": None,
        "decoder.layers.self_attention.core_attention._extra_state/shard_0_4": None,
        COMMON: {"args": argparse.Namespace(num_layers=4)},
    }
    report = exported(rewrite(release, tmp_path / "iter_1", add=head | state, objects=objects), tmp_path / "a", untied)
    assert report.dropped == tuple(sorted(head))
    exported(release, tmp_path / "b", untied)
    with_head, without = Weights(tmp_path / "a"), Weights(tmp_path / "b")
    assert with_head.files.keys() == without.files.keys()
    assert all(torch.equal(with_head[name], without[name]) for name in without.files)


def test_vocabulary_padding_is_cut(release, untied, tmp_path):
    report = exported(rewrite(release, tmp_path / "iter_1", pad=9), tmp_path / "out", untied)
    assert report.padding == 9
    assert Weights(tmp_path / "out").shape("lm_head.weight") == (503, 36)
    assert torch.equal(Weights(tmp_path / "out")["lm_head.weight"], Weights(untied)["lm_head.weight"])


def test_layers_that_are_kept_apart(release, untied, tmp_path):
    checkpoint = Checkpoint(release)
    stacked = {key: x.size for key, x in checkpoint.tensors.items() if key.startswith("decoder.layers.")}
    apart = {
        key.replace("layers.", f"layers.{i}."): layer
        for key, size in stacked.items()
        for i, layer in enumerate(checkpoint.read(key, [0] * len(size), size))
    }
    exported(rewrite(release, tmp_path / "iter_1", without=stacked, add=apart), tmp_path / "out", untied)
    found, wanted = Weights(tmp_path / "out"), Weights(untied)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted.files)


def refused(checkpoint, like, tmp_path, match):
    with pytest.raises(ValueError, match=match):
        exported(checkpoint, tmp_path / "out", like)
    assert not (tmp_path / "out").exists()


def test_unknown_tensor(release, untied, tmp_path):
    changed = rewrite(release, tmp_path / "iter_1", add={"decoder.layers.mlp.router.weight": torch.ones(2)})
    refused(changed, untied, tmp_path, r"cannot be named in Hugging Face's terms: decoder\.layers\.mlp\.router\.weight")


def test_unknown_object(release, untied, tmp_path):
    changed = rewrite(release, tmp_path / "iter_1", objects={"decoder.surprise/shard_0_1": 1})
    refused(changed, untied, tmp_path, r"decoder\.surprise/shard_0_1")


def test_missing_tensor(release, untied, tmp_path):
    changed = rewrite(release, tmp_path / "iter_1", without=["decoder.layers.self_attention.q_layernorm.weight"])
    refused(changed, untied, tmp_path, r"missing decoder\.layers\.self_attention\.q_layernorm\.weight")


def test_head_under_another_name_is_unknown(release, untied, tmp_path):
    changed = rewrite(release, tmp_path / "iter_1", add={"my_flow_head.weight": torch.ones(2)})
    refused(changed, untied, tmp_path, r"my_flow_head\.weight")


def test_tied_config_for_an_untied_model(release, tied, tmp_path):
    refused(release, tied, tmp_path, r"output_layer\.weight \(tie_word_embeddings")


def change_config(like, folder, **values):
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(json.loads((like / CONFIG).read_text()) | values))
    return folder


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"vocab_size": 600}, r"embedding\.word_embeddings\.weight is \[503, 36\], the config means \[600, 36\]"),
        ({"intermediate_size": 40}, r"linear_fc1\.weight is \[4, 88, 36\], the config means \[4, 80, 36\]"),
        ({"num_hidden_layers": 3}, r"is \[4, 36\], the config means \[3, 36\]"),
    ],
)
def test_config_of_another_shape(release, untied, tmp_path, values, match):
    refused(release, change_config(untied, tmp_path / "like", **values), tmp_path, match)


@pytest.mark.parametrize(("option", "trained", "meant"), [("rotary_base", 10000, 50000), ("vocab_size", 510, 503)])
def test_config_that_would_compute_something_else(release, untied, tmp_path, option, trained, meant):
    stored = {COMMON: {"args": argparse.Namespace(**{option: trained})}}
    changed = rewrite(release, tmp_path / "iter_1", objects=stored, pad=9)
    refused(changed, untied, tmp_path, f"trained with {option} {trained}, but the config means {meant}")


LLAMA, MISTRAL, QWEN2 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"
SCALED = {"use_rope_scaling": True, "rope_scaling_factor": 32.0}


@pytest.mark.parametrize(
    ("case", "trained", "match"),
    [
        ("Llama 3's frequencies", SCALED | {"use_rope_scaling": False}, "use_rope_scaling False, .* means True"),
        ("Llama 3's frequencies", SCALED | {"rope_scaling_factor": 8.0}, r"rope_scaling_factor 8\.0, .* means 32\.0"),
        ("Llama 3's frequencies", SCALED, None),
        (f"{LLAMA}, tied: False", SCALED, "use_rope_scaling True, .* means False"),
        (f"{LLAMA}, tied: False", {"use_rope_scaling": False, "rope_scaling_factor": 8.0, "window_size": None}, None),
        (f"{LLAMA}, tied: False", {"rotary_percent": 0.5}, r"rotary_percent 0\.5, .* means 1\.0"),
        (f"{LLAMA}, tied: False", {"rotary_seq_len_interpolation_factor": 2}, "interpolation_factor 2, .* means None"),
        (f"{QWEN2}, tied: False", {"window_size": (16, 0)}, "window_size 16,0, .* means None"),
        ("Mistral 0.1's window", {"window_size": (16, 0)}, None),
        ("Mistral 0.1's window", {"window_size": (17, 0)}, "window_size 17,0, .* means 16,0"),
        ("Mistral 0.1's window", {"window_size": None}, "window_size None, .* means 16,0"),
        ("Mistral 0.1's window", {"window_size": (16, 0), "window_attn_skip_freq": 2}, "window_attn_skip_freq 2"),
    ],
)
def test_what_no_shape_shows_is_in_the_arguments(tmp_path, case, trained, match):
    architecture, changes = CASES[case]
    hf = save_model(tmp_path / "hf", architecture, **changes)
    import_hf(hf, tmp_path / "megatron", progress=False)
    common = {COMMON: {"args": argparse.Namespace(**trained)}}
    checkpoint = rewrite(tmp_path / "megatron" / "release", tmp_path / "iter_1", objects=common)
    if match:
        refused(checkpoint, hf, tmp_path, match)
    else:
        assert exported(checkpoint, tmp_path / "out", hf).tensors == len(Weights(hf).files)


def test_a_bias_is_in_the_names(tmp_path):
    """Qwen2 without its bias would be Llama, in the same shapes."""
    name = r"decoder\.layers\.self_attention\.linear_qkv\.bias"
    for like, other, match in (
        (LLAMA, QWEN2, f"cannot be named in Hugging Face's terms: {name}"),
        (QWEN2, LLAMA, f"missing {name}"),
    ):
        hf, wrong = (save_model(tmp_path / like / x, x, head_dim=6) for x in (other, like))
        import_hf(hf, tmp_path / like / "megatron", progress=False)
        refused(tmp_path / like / "megatron", wrong, tmp_path, match)


def test_the_dtype_is_the_checkpoints_by_default(imported, untied, tmp_path):
    like = change_config(untied, tmp_path / "like", dtype="bfloat16")
    exported(imported, tmp_path / "kept", like)
    assert Weights(tmp_path / "kept").dtype("lm_head.weight") == torch.float32
    assert json.loads((tmp_path / "kept" / CONFIG).read_text())["dtype"] == "float32"
    exported(imported, tmp_path / "cast", like, dtype=torch.bfloat16)
    cast, wanted = Weights(tmp_path / "cast"), Weights(untied)
    assert all(torch.equal(cast[name], wanted[name].bfloat16()) for name in wanted.files)
    assert json.loads((tmp_path / "cast" / CONFIG).read_text())["dtype"] == "bfloat16"


def test_companions_are_copied_and_weights_are_not(imported, untied, tmp_path):
    like = change_config(untied, tmp_path / "like", torch_dtype="bfloat16")
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "merges.txt")
    for name in (*kept, "README.md", "model-00001-of-00009.safetensors", "optimizer.pt"):
        (like / name).write_text(name)
    (like / "additional_chat_templates").mkdir()
    (like / "additional_chat_templates" / "rag.jinja").write_text("rag")
    exported(imported, tmp_path / "out", like)
    found = {str(x.relative_to(tmp_path / "out")) for x in (tmp_path / "out").rglob("*") if x.is_file()}
    assert found == {*kept, "additional_chat_templates/rag.jinja", CONFIG, "model.safetensors", RECORD}
    config, source = (json.loads((x / CONFIG).read_text()) for x in (tmp_path / "out", like))
    assert config == source | {"torch_dtype": "float32"}


def test_existing_output_is_kept(imported, untied, tmp_path):
    exported(imported, tmp_path / "out", untied)
    (tmp_path / "out" / "notes").touch()
    assert exported(imported, tmp_path / "out", untied).up_to_date
    with pytest.raises(ValueError, match=r"other values of options\.dtype; choose another --output, or .* --force"):
        exported(imported, tmp_path / "out", untied, dtype=torch.bfloat16)
    assert (tmp_path / "out" / "notes").exists()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"model\.safetensors has 3 bytes instead of .*--force"):
        exported(imported, tmp_path / "out", untied)
    assert not exported(imported, tmp_path / "out", untied, force=True).up_to_date
    assert not (tmp_path / "out" / "notes").exists()


def test_two_at_once_write_one_whole_folder(imported, untied, tmp_path):
    """Files of one tensor or two, so that the first is still at work when the second starts."""
    output = tmp_path / "out"
    command = ["-m", "megatron_sfr.cli", "convert", "export", "--checkpoint", str(imported)]
    command += ["--like", str(untied), "--max-shard-gb", "0.00001", "--output", str(output)]
    with warm.popen(*command) as first, warm.popen(*command) as second:
        errors = [process.communicate()[1] for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert 0 in codes, errors  # the other was refused, or came late and found it up to date
    assert all(code == 0 or "is being written by process" in said for code, said in zip(codes, errors, strict=True)), (
        errors
    )
    found, wanted = Weights(output), Weights(untied)
    assert found.files.keys() == wanted.files.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted.files)
    assert list(tmp_path.iterdir()) == [output]


def test_the_reference_is_never_the_output(imported, untied):
    with pytest.raises(ValueError, match="is the folder of --like"):
        exported(imported, untied, untied, force=True)
