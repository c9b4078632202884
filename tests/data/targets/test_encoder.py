"""Encoders, the bundled MiniLM and small ones: pooling, identity, and which options are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding, Transformer
from transformers import BertConfig, BertModel

from megatron_sfr.data.targets.encoder import Encoder, EncoderOptions, encoder_path

TEXTS = ["the sea is blue", "yes", "the sky is grey and the sea is blue"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A sentence-transformers folder of one small layer, whose own pooling takes the maximum."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = None  # else the text is put into a chat turn
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **shape)
    BertModel(config).save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    transformer = Transformer(str(folder / "hf"), max_seq_length=32)
    SentenceTransformer(modules=[transformer, Pooling(16, "max"), Normalize()], device="cpu").save(str(folder / "st"))
    return folder / "st"


def states(folder: Path, text: str) -> np.ndarray:
    """The states [tokens, dim] of one text, by transformers alone."""
    from transformers import AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0].numpy()


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("mean", lambda states: states.mean(0)),
        ("cls", lambda states: states[0]),
        ("last", lambda states: states[-1]),
        ("own", lambda states: states.max(0)),
    ],
)
def test_pooling_over_the_states_of_the_text_alone(bert: Path, pooling: str, pool):
    vectors = Encoder(str(bert), EncoderOptions(pooling=pooling)).encode(TEXTS)

    for text, vector in zip(TEXTS, vectors, strict=True):
        expected = pool(states(bert, text))
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=2e-6)


def test_the_bundled_minilm_needs_no_network():
    encoder = Encoder("minilm", EncoderOptions())
    vectors = encoder.encode(["A cat sits on the mat.", "A kitten rests on a rug.", "The bond market fell on Tuesday."])

    assert encoder.identity.dim == vectors.shape[1] == 384
    assert encoder.identity.max_length == 256
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]


def test_a_folder_of_the_name_of_the_bundled_encoder_comes_first(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(encoder_path("minilm")).is_dir()
    (tmp_path / "minilm").mkdir()
    assert encoder_path("minilm") == "minilm"
    assert encoder_path("any/name") == "any/name"


def test_the_identity_follows_the_weights_and_the_tokenizer_and_not_the_folder(bert: Path, tmp_path: Path):
    def identity(change: str | None) -> str:
        model = SentenceTransformer(str(bert), device="cpu")
        if change == "weight":
            model.state_dict()["0.model.embeddings.word_embeddings.weight"][7, 3] += 1e-6
        if change == "token":
            model.tokenizer.add_tokens(["ocean"])
        model.save(str(tmp_path / str(change)))
        return Encoder(str(tmp_path / str(change)), EncoderOptions()).identity.encoder_sha256

    same = Encoder(str(bert), EncoderOptions(pooling="cls")).identity.encoder_sha256
    assert identity(None) == same
    assert len({same, identity("weight"), identity("token")}) == 3


def test_computes_in_the_requested_dtype_and_returns_fp32(bert: Path):
    exact = Encoder(str(bert), EncoderOptions()).encode(TEXTS)
    rough = Encoder(str(bert), EncoderOptions(dtype="bfloat16")).encode(TEXTS)

    assert rough.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rough, axis=1), 1, atol=1e-6)
    assert 0 < np.abs(exact - rough).max() < 0.02  # bfloat16 keeps 8 bits


def test_the_rest_of_a_long_text_is_not_read(bert: Path):
    encoder = Encoder(str(bert), EncoderOptions(max_length=4))
    same, longer = encoder.encode(["the sea is blue", "the sea is blue and the sky is grey"])

    assert encoder.identity.max_length == 4
    np.testing.assert_allclose(same, longer, atol=1e-6)


@pytest.fixture(scope="module")
def prompted(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoder with its own prompts, one of which it uses where nothing is said, and no normalization."""
    folder = tmp_path_factory.mktemp("prompted")
    modules = list(SentenceTransformer(str(bert), device="cpu"))[:2]
    prompts = {"query": "the sky ", "document": "grey "}
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts, default_prompt_name="document")
    model.save(str(folder))
    return folder


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ({}, "grey "),
        ({"prompt_name": "query"}, "the sky "),
        ({"prompt": "is blue "}, "is blue "),
        ({"prompt": ""}, ""),
    ],
)
def test_the_prompt_stands_before_each_text(prompted: Path, options: dict, prompt: str):
    encoder = Encoder(str(prompted), EncoderOptions(**options))
    plain = Encoder(str(prompted), EncoderOptions(prompt=""))

    assert encoder.identity.prompt == prompt
    np.testing.assert_allclose(encoder.encode(TEXTS), plain.encode([prompt + text for text in TEXTS]), atol=1e-6)


def test_vectors_are_left_as_they_are_where_that_is_asked(prompted: Path):
    unit = Encoder(str(prompted), EncoderOptions()).encode(TEXTS)
    own = Encoder(str(prompted), EncoderOptions(normalize="none")).encode(TEXTS)

    norms = np.linalg.norm(own, axis=1, keepdims=True)
    assert np.abs(norms - 1).max() > 0.1
    np.testing.assert_allclose(own / norms, unit, atol=1e-6)


def test_a_vector_that_fp16_cannot_hold_is_refused_unless_it_is_scaled(prompted: Path, tmp_path: Path):
    model = SentenceTransformer(str(prompted), device="cpu")
    model.state_dict()["0.model.encoder.layer.0.output.LayerNorm.weight"].fill_(1e5)
    model.save(str(tmp_path))

    with pytest.raises(ValueError, match=r"gives no usable vector for 'the sea is blue'; use .*--normalize unit"):
        Encoder(str(tmp_path), EncoderOptions(normalize="none")).encode(TEXTS)
    assert np.isfinite(Encoder(str(tmp_path), EncoderOptions()).encode(TEXTS)).all()


def test_a_prompt_that_the_encoder_does_not_have_is_refused(prompted: Path):
    with pytest.raises(ValueError, match="has no prompt 'passage'; it has document, query"):
        Encoder(str(prompted), EncoderOptions(prompt_name="passage"))
    with pytest.raises(ValueError, match="a prompt or the name of one, not both"):
        EncoderOptions(prompt="a", prompt_name="b")


def test_code_that_comes_with_an_encoder_runs_only_on_request(bert: Path, tmp_path: Path):
    folder = tmp_path / "coded"
    shutil.copytree(bert, folder)
    module = "class Shifted(Pooling):\n    def forward(self, features, **kwargs):\n        features = super().forward"
    module += "(features)\n        features['sentence_embedding'] = features['sentence_embedding'] * 0 + 1\n"
    module += "        return features\n"
    base = "from sentence_transformers.sentence_transformer.modules import Pooling\n\n"
    (folder / "shifted.py").write_text(base + module)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "shifted.Shifted"
    (folder / "modules.json").write_text(json.dumps(modules))

    with pytest.raises(ValueError, match="cannot load the encoder"):
        Encoder(str(folder), EncoderOptions(pooling="own"))
    trusted = Encoder(str(folder), EncoderOptions(pooling="own", trust_remote_code=True))
    np.testing.assert_allclose(trusted.encode(TEXTS), 16**-0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_length": 65}, "max length 65 is above the 64 positions"),
        ({"max_length": 2}, "max length 2 leaves no room"),
        ({"pooling": "max"}, "pooling is 'max'; choose mean, cls, last, own"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose float32"),
        ({"normalize": "l1"}, "normalize is 'l1'; choose unit, none"),
    ],
)
def test_options_it_cannot_follow_are_refused(bert: Path, options: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        Encoder(str(bert), EncoderOptions(**options))


def test_an_encoder_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot load the encoder .*; give a sentence-tr") as caught:
        Encoder(str(tmp_path / "none"), EncoderOptions())
    assert "\n" not in str(caught.value)


def test_an_encoder_without_pooling_keeps_its_own(tmp_path: Path, bpe):
    SentenceTransformer(modules=[StaticEmbedding(bpe, embedding_dim=8)], device="cpu").save(str(tmp_path))

    with pytest.raises(ValueError, match="has no pooling to set; use --pooling own"):
        Encoder(str(tmp_path), EncoderOptions())
    assert Encoder(str(tmp_path), EncoderOptions(pooling="own")).encode(TEXTS).shape == (3, 8)


def test_a_vector_that_is_not_a_direction_is_refused(bert: Path, tmp_path: Path):
    model = SentenceTransformer(str(bert), device="cpu")
    model.state_dict()["0.model.embeddings.word_embeddings.weight"].fill_(float("nan"))
    model.save(str(tmp_path))

    with pytest.raises(ValueError, match="gives no usable vector for 'the sea is blue'"):
        Encoder(str(tmp_path), EncoderOptions()).encode(TEXTS)
