"""The example on the standard library: what it takes, and that its recipes are the trainer's."""

import json
from pathlib import Path

import pytest

from examples.stdlib_cpt import corpus
from megatron_sfr.config.settings import read_settings

FOLDER = Path(corpus.__file__).parent


def test_a_module_is_on_one_side_and_a_larger_corpus_keeps_it(tmp_path: Path) -> None:
    library = Path(corpus.sysconfig.get_path("stdlib"))
    sides: list[dict[str, set[str]]] = []
    for megabytes in (1.0, 2.0):
        corpus.write_corpus(library, tmp_path, megabytes)
        rows = {side: (tmp_path / f"{side}.jsonl").read_text().splitlines() for side in ("train", "validation")}
        sides.append({side: {json.loads(row)["path"] for row in lines} for side, lines in rows.items()})
        assert sum(len(row) for lines in rows.values() for row in lines) > megabytes * 9e5
    assert not sides[1]["train"] & sides[1]["validation"]
    for side in ("train", "validation"):
        assert sides[0][side] < sides[1][side]
        assert not [path for path in sides[1][side] if path.startswith(("test/", "site-packages/", "idlelib/"))]


def test_too_little_source_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.py").write_text("x = 1\n")
    assert corpus.main(["--output", str(tmp_path / "out"), "--library", str(tmp_path)]) == 2
    assert "too little source for 4.0 MB; give more --megabytes" in capsys.readouterr().err


def test_the_second_run_resumes_from_the_first() -> None:
    base = read_settings(["--recipe", str(FOLDER / "base.yaml")]).recipe
    more = read_settings(["--recipe", str(FOLDER / "base.yaml"), "--recipe", str(FOLDER / "sfr.yaml")]).recipe
    assert more["pretrained_checkpoint"] == base["save"] != more["save"]
    assert more["sfr_targets"] == "online"
    model = (
        "num_layers",
        "hidden_size",
        "vocab_size",
        "seq_length",
        "train_data_path",
        "dataloader_inter_document_masking",
    )
    assert [key for key in model if more[key] != base[key]] == []


def test_the_denoiser_is_the_same_model_over_the_same_rows() -> None:
    base = read_settings(["--recipe", str(FOLDER / "base.yaml")]).recipe
    more = read_settings(["--recipe", str(FOLDER / "base.yaml"), "--recipe", str(FOLDER / "kl_flow.yaml")]).recipe
    assert more["training_task"] == "kl-flow"
    assert more["save"] != base["save"]
    model = ("num_layers", "hidden_size", "vocab_size", "seq_length", "train_data_path")
    assert [key for key in model if more[key] != base[key]] == []
