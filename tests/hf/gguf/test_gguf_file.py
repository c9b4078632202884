"""GGUF files, written here by gguf's own writer: the same weights as the values that they store, or one line."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from megatron_sfr import cli
from megatron_sfr.demo.train_tokenizer import train_tokenizer
from megatron_sfr.hf.compare_logits import check_logits
from megatron_sfr.hf.end_tokens import end_tokens_of
from megatron_sfr.hf.export_hf import export_hf
from megatron_sfr.hf.families.family_registry import megatron_flags
from megatron_sfr.hf.hf_folder import SINGLE, Weights, read_config
from megatron_sfr.hf.hf_model import open_source
from megatron_sfr.hf.import_hf import import_hf
from megatron_sfr.storage.model_folders import find_gguf
from tests.hf.models import save_model

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # rows of whole blocks of 32; Qwen3's heads as transformers assumes
    "llama": ("LlamaForCausalLM", SHAPE | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", SHAPE),
    "qwen3": ("Qwen3ForCausalLM", SHAPE | {"head_dim": 128}),
}
END = 7


@pytest.fixture(scope="module")
def gguf() -> Any:
    pytest.importorskip("accelerate")
    return pytest.importorskip("gguf")


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def hf(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, changes = MODELS[family]
    return save_model(tmp_path_factory.mktemp(family) / "hf", architecture, **changes)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    architecture, changes = MODELS["llama"]
    return save_model(tmp_path / "hf", architecture, **changes)


def write_gguf(gguf: Any, hf: Path, path: Path, kind: str, **changes: Any) -> Path:
    """Writes the model as llama.cpp's converter does. changes: more keys (None: left out) and more tensors."""
    config, weights = read_config(hf), Weights(hf)
    arch = config["model_type"]
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    }
    for key, value in numbers.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_eos_token_id(END)
    if "tokenizer" in changes:
        add_tokenizer(writer, changes["tokenizer"])
    for key, value in changes.get("keys", {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    tensors = {name: weights[name].numpy() for name in weights.files} | changes.get("tensors", {})
    for name, value in tensors.items():
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = permuted(value, config["head_dim"])
        stem, _, suffix = name.rpartition(".")
        stored = gguf.GGMLQuantizationType[kind if value.ndim > 1 else "F32"]
        if changes.get("without") != name:
            named = names.get_name(stem) or stem
            writer.add_tensor(f"{named}.{suffix}", gguf.quants.quantize(value, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any, tokenizer: Any) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_chat_template(tokenizer.chat_template)


def permuted(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys: the two halves of each head interleaved."""
    return np.ascontiguousarray(
        weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    )


def stored_values(gguf: Any, hf: Path, folder: Path, kind: str, dtype: torch.dtype) -> Path:
    """An HF folder of the values that a file of this kind holds, by gguf's own de-quantization."""
    weights, stored = Weights(hf), gguf.GGMLQuantizationType[kind]
    found = {}
    for name in weights.files:
        value = weights[name].numpy()
        if value.ndim > 1:
            value = gguf.quants.dequantize(gguf.quants.quantize(value, stored), stored)
        found[name] = torch.from_numpy(np.copy(value)).to(dtype)
    folder.mkdir()
    (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
    save_file(found, folder / SINGLE)
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F32", torch.float32), ("BF16", torch.bfloat16), ("Q4_1", torch.bfloat16)]
)
def test_an_import_has_the_values_that_the_file_stores(gguf, hf, tmp_path, kind, dtype) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "model").mkdir()
    write_gguf(gguf, hf, tmp_path / "model" / "tiny.gguf", kind)
    expected = Weights(stored_values(gguf, hf, tmp_path / "expected", kind, dtype))
    report = import_hf(tmp_path / "model", tmp_path / "megatron", check=True, progress=False)
    assert report.dtypes == (dtype,)
    assert import_hf(tmp_path / "model", tmp_path / "megatron", progress=False).up_to_date
    assert end_tokens_of(tmp_path / "megatron") == (END,)
    export_hf(tmp_path / "megatron", tmp_path / "back", like=hf, progress=False)
    back = Weights(tmp_path / "back")
    assert back.files.keys() == expected.files.keys()
    for name in expected.files:
        assert torch.equal(back[name], expected[name]), name


def test_a_start_reads_the_parts_of_a_tensor(gguf, hf, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """`sfr_hf_load` reads through `open_source`: the same chunks as from a Hugging Face folder of these values."""
    source = open_source(write_gguf(gguf, hf, tmp_path / "tiny.gguf", "Q8_0"))
    folder = open_source(stored_values(gguf, hf, tmp_path / "expected", "Q8_0", torch.bfloat16))
    assert source.dimensions == folder.dimensions
    assert source.flags | {"init_method_std": 0.2} == folder.flags  # how the model was initialized, which no file says
    assert list(source.dtypes) == list(folder.dtypes)
    for entry in source.dtypes:
        rows = entry.mapping.megatron_shape(source.dimensions)[entry.mapping.tp_dim or 0]
        middle = rows // 2 // (grain := entry.mapping.grain(source.dimensions)) * grain
        for start, stop in ((0, middle), (middle, rows)):
            assert torch.equal(source.read(entry, start, stop), folder.read(entry, start, stop)), entry.names


def test_the_commands_say_that_it_is_dequantized(gguf, hf, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    path = write_gguf(gguf, hf, tmp_path / "tiny.gguf", "Q4_1")
    assert cli.main(["convert", "recipe", "--hf", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"# model, from {path}: Q4_1, de-quantized by transformers to bfloat16; these are not the weights" in said
    assert yaml.safe_load(said) | {"init_method_std": 0.2} == megatron_flags(read_config(hf))
    assert cli.main(["convert", "import", "--hf", str(path), "--output", str(tmp_path / "megatron")]) == 0
    assert f"\n{path}: Q4_1, de-quantized by transformers" in capsys.readouterr().out


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frequencies": ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "scaled rotary frequencies"),
    "scaling": ({"keys": {"rope.scaling.type": "yarn"}}, "rope.scaling.type is yarn: transformers does not read"),
    "experts": ({"keys": {"expert_count": 4}}, "experts are not converted from GGUF"),
    "another tensor": (
        {"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}},
        "holds 21 tensors, of which transformers reads 20: start from the model's safetensors",
    ),
    "a missing one": ({"without": "model.layers.1.mlp.up_proj.weight"}, "missing model.layers.1.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_would_leave_out_is_refused(gguf, llama, tmp_path, case) -> None:  # type: ignore[no-untyped-def]
    changes, message = REFUSED[case]
    path = write_gguf(gguf, llama, tmp_path / "tiny.gguf", "Q8_0", **changes)
    with pytest.raises(ValueError, match=message):
        import_hf(path, tmp_path / "megatron", progress=False)
    assert not (tmp_path / "megatron").exists()


def test_damaged_files_are_one_line(gguf, llama, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    path = write_gguf(gguf, llama, tmp_path / "tiny.gguf", "Q8_0")
    content = path.read_bytes()
    for size in (0, 3, 20, 300, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:size])
        assert cli.main(["convert", "import", "--hf", str(path), "--output", str(tmp_path / "megatron")]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
        assert str(path) in line
        assert not (tmp_path / "megatron").exists()


def test_which_file_a_path_names(untied: Path, tmp_path: Path) -> None:
    assert find_gguf(untied) is None
    assert find_gguf(tmp_path) is None
    (tmp_path / "a.gguf").touch()
    assert find_gguf(tmp_path) == find_gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"holds a\.gguf, b\.gguf: name one of these files"):
        find_gguf(tmp_path)
    (tmp_path / "model-00001-of-00002.gguf").touch()
    with pytest.raises(ValueError, match="is one part of a model"):
        open_source(tmp_path / "model-00001-of-00002.gguf")


def test_without_the_package_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r'pip install "megatron-sfr\[gguf\]"'):
        open_source(tmp_path / "a.gguf")


def test_a_file_becomes_a_folder_that_transformers_and_we_read(gguf, llama, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(["red green blue, define: a colour"], 503)
    path = write_gguf(gguf, llama, tmp_path / "tiny.gguf", "Q4_1", tokenizer=tokenizer)
    command = ["convert", "dequantize", str(path), "--output", str(tmp_path / "folder")]
    assert cli.main(command) == 0
    assert f"\n{path}: Q4_1, de-quantized by transformers" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "is up to date" in capsys.readouterr().out
    expected = Weights(stored_values(gguf, llama, tmp_path / "expected", "Q4_1", torch.bfloat16))
    found = Weights(tmp_path / "folder")
    assert found.files.keys() == expected.files.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected.files)
    read = AutoTokenizer.from_pretrained(tmp_path / "folder")
    text = "green blue, red"
    assert read(text).input_ids == tokenizer(text).input_ids
    assert read.chat_template == tokenizer.chat_template
    assert end_tokens_of(tmp_path / "folder") == (END,)
    assert check_logits(tmp_path / "folder", tmp_path / "expected").difference == 0
