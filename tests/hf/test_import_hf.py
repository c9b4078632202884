"""An import exports to the same bits; disagreements between config and weights are refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sfr import cli
from megatron_sfr.hf import import_hf as importer
from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.hf_folder import RECORD, SINGLE, Weights, read_config
from megatron_sfr.hf.import_hf import check_import, import_hf
from megatron_sfr.hf.megatron.megatron_checkpoint import Checkpoint, find_checkpoint
from megatron_sfr.hf.megatron.megatron_model import check_imported
from megatron_sfr.hf.megatron.tracker import TRACKER
from tests import warm
from tests.hf.models import CASES, save_model


def same_bits(a, b):
    a, b = Weights(a), Weights(b)
    assert a.files.keys() == b.files.keys()
    for name in a.files:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(tmp_path, case):
    """In bf16; the test below has a model in fp32."""
    architecture, changes = CASES[case]
    source = save_model(tmp_path / "hf", architecture, dtype=torch.bfloat16, max_shard_size="100KB", **changes)
    report = import_hf(source, tmp_path / "megatron", check=True, progress=False)
    assert (report.dtypes, report.checked) == ((torch.bfloat16,), True)
    export_hf(tmp_path / "megatron", tmp_path / "back", like=source, progress=False)
    same_bits(source, tmp_path / "back")


def test_round_trip_in_many_boxes(tmp_path, untied, monkeypatch):
    monkeypatch.setattr(importer, "CHUNK_BYTES", 1000)
    import_hf(untied, tmp_path / "megatron", check=True, progress=False)
    tensors = Checkpoint(tmp_path / "megatron" / "release").tensors
    assert len(tensors["output_layer.weight"].chunks) == 73  # 503 * 36 * 4 bytes in thousands
    proj = tensors["decoder.layers.self_attention.linear_proj.weight"]
    assert {tuple(chunk.sizes) for chunk in proj.chunks} <= {(1, 36, 6), (1, 36, 7)}  # cut where TP cuts
    export_hf(tmp_path / "megatron", tmp_path / "back", like=untied, progress=False)
    same_bits(untied, tmp_path / "back")


def test_it_is_a_release_that_starts_training_afresh(imported):
    assert (imported / TRACKER).read_text() == "release"
    assert find_checkpoint(imported) == imported / "release"


def test_a_run_that_describes_another_model_is_refused(imported):
    checkpoint = Checkpoint(imported / "release")
    check_imported({"rotary_base": 50000, "layernorm_epsilon": 1e-5}, checkpoint)
    with pytest.raises(
        ValueError, match=r"the run has rotary_base 10000, but .*release was imported from .* with 50000"
    ):
        check_imported({"rotary_base": 10000, "layernorm_epsilon": 1e-5}, checkpoint)


def test_an_import_that_is_there_is_up_to_date(imported, untied, tmp_path, capsys):
    before = (imported / TRACKER).stat()
    report = import_hf(untied, imported, check=True, progress=False)
    assert report.up_to_date
    assert (imported / TRACKER).stat() == before
    assert cli.main(["convert", "import", "--hf", str(untied), "--output", str(imported)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{imported} is up to date"
    other = shutil.copytree(untied, tmp_path / "hf", copy_function=shutil.copyfile)
    with pytest.raises(ValueError, match="made with other values of hf; choose another --output, or replace it"):
        import_hf(other, imported, progress=False)
    assert find_checkpoint(imported).is_dir()


def test_existing_output_of_unknown_origin_is_refused_and_kept(imported, untied, tmp_path):
    output = shutil.copytree(imported, tmp_path / "copy")
    (output / RECORD).unlink()
    with pytest.raises(ValueError, match="exists: choose another --output"):
        import_hf(untied, output, progress=False)
    assert find_checkpoint(output).is_dir()


def test_two_at_once_write_one_whole_checkpoint(untied, tmp_path):
    output = tmp_path / "out"
    command = ["-m", "megatron_sfr.cli", "convert", "import", "--hf", str(untied), "--output", str(output)]
    with warm.popen(*command) as first, warm.popen(*command) as second:
        errors = [process.communicate()[1] for process in (first, second)]
    codes = [first.returncode, second.returncode]
    assert 0 in codes, errors  # the other was refused, or came late and found it, up to date at its first look
    refusals = ("is being written by process", "exists: choose another --output")
    assert all(code == 0 or any(x in said for x in refusals) for code, said in zip(codes, errors, strict=True))
    check_import(output / "release", read_config(untied), Weights(untied), progress=False)
    assert list(tmp_path.iterdir()) == [output]


@pytest.fixture
def folder(untied, tmp_path):
    """A model in one file, whose tensors and config a test may change."""
    (tmp_path / "hf").mkdir()
    for file in untied.iterdir():
        (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "hf"


def refused(folder, match):
    with pytest.raises(ValueError, match=match):
        import_hf(folder, folder.parent / "megatron", progress=False)
    assert not (folder.parent / "megatron").exists()


def change_tensors(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_missing_tensor(folder):
    change_tensors(folder, lambda x: x.pop("model.layers.2.mlp.up_proj.weight"))
    refused(folder, r"missing model\.layers\.2\.mlp\.up_proj\.weight")


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers(folder, value):
    """In a row of the vocabulary that training may never use: it would run, and could not save."""
    change_tensors(folder, lambda x: x["model.embed_tokens.weight"][500].fill_(value))
    refused(folder, r"model\.embed_tokens\.weight: values are NaN or infinite; copy the model again")


@pytest.mark.parametrize("end", ["weight_scale_inv", "qweight", "scales", "absmax"])
def test_weights_that_only_their_names_show_to_be_quantized(folder, end):
    """As in folders of MLX or Model Optimizer, whose config.json may not say it."""
    change_tensors(folder, lambda x: x.update({f"model.layers.0.mlp.up_proj.{end}": torch.zeros(3)}))
    refused(folder, f"up_proj\\.{end}: the weights are quantized; start from the unquantized model")


def test_a_head_that_is_missing_may_be_tied(folder):
    change_tensors(folder, lambda x: x.pop("lm_head.weight"))
    refused(folder, r"missing lm_head\.weight: .* tie_word_embeddings: true .* if it is model\.embed_tokens\.weight")


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter: name its base model here, and .* in --adapter"):
        import_hf(tmp_path, tmp_path / "out", progress=False)


def test_unknown_tensor(folder):
    change_tensors(folder, lambda x: x.update({"model.layers.0.self_attn.sinks": torch.zeros(6)}))
    refused(folder, r"model\.layers\.0\.self_attn\.sinks: no weight of config\.json's architecture")


def with_rotary_buffers(folder, dtype, base):
    """As Llama models of 2023: the rotary frequencies of heads of 10 numbers, stored with each layer."""
    frequencies = 1 / base ** (torch.arange(0, 10, 2) / 10)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(4)]
    change_tensors(folder, lambda x: x.update({name: frequencies.to(dtype, copy=True) for name in names}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_rotary_frequencies_are_dropped(folder, tmp_path, dtype):
    weights = load_file(folder / SINGLE)
    with_rotary_buffers(folder, dtype, 50000.0)
    import_hf(folder, tmp_path / "megatron", check=True, progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "back", like=folder, progress=False)
    assert load_file(tmp_path / "back" / SINGLE).keys() == weights.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_rotary_frequencies_of_another_base_are_refused(folder, dtype):
    with_rotary_buffers(folder, dtype, 10000.0)
    refused(folder, r"inv_freq (has other rotary frequencies than config\.json's|is I64)")


def test_config_of_another_size(folder):
    change_config(folder, intermediate_size=48)
    refused(folder, r"gate_proj\.weight is \[44, 36\], config\.json means \[48, 36\]")


def test_config_of_another_depth(folder):
    change_config(folder, num_hidden_layers=3)
    refused(folder, r"model\.layers\.3\.input_layernorm\.weight")


def test_dtypes_that_one_tensor_cannot_hold(folder):
    def halve(tensors):
        name = "model.layers.1.self_attn.k_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    change_tensors(folder, halve)
    refused(folder, r"q_proj\.weight, .*k_proj\.weight, .* differ in dtype")


def test_norms_in_fp32_beside_weights_in_bf16(folder, tmp_path):
    def halve(tensors):
        tensors.update({name: x.bfloat16() for name, x in tensors.items() if x.ndim == 2})

    change_tensors(folder, halve)
    report = import_hf(folder, tmp_path / "megatron", check=True, progress=False)
    assert report.dtypes == (torch.bfloat16, torch.float32)
    export_hf(tmp_path / "megatron", tmp_path / "back", like=folder, shard_bytes=70_000, progress=False)
    same_bits(folder, tmp_path / "back")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights(folder, dtype):
    def quantize(tensors):
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(dtype)

    change_tensors(folder, quantize)
    refused(folder, r"down_proj\.weight is (F8_E4M3|I8); .* start from the unquantized model")


def test_layers_of_two_dtypes(folder):
    def halve(tensors):
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = tensors[name].bfloat16()

    change_tensors(folder, halve)
    refused(folder, r"the layers of decoder\.layers\.mlp\.linear_fc2\.weight differ in dtype")


def test_tied_model_may_carry_the_copy_but_no_other_head(tied, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_bytes((tied / "config.json").read_bytes())
    tensors = load_file(tied / SINGLE)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / SINGLE)
    import_hf(folder, tmp_path / "same", check=True, progress=False)
    head[3, 4] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / SINGLE)
    refused(folder, r"lm_head\.weight is not model\.embed_tokens\.weight")


def test_check_sees_one_bit(imported, folder):
    def flip(tensors):
        tensors["model.layers.3.self_attn.v_proj.weight"].view(torch.int32)[4, 5] ^= 1

    change_tensors(folder, flip)
    config = read_config(folder)
    with pytest.raises(ValueError, match=r"model\.layers\.3\.self_attn\.v_proj\.weight was not read back"):
        importer.check_import(imported / "release", config, Weights(folder), progress=False)
