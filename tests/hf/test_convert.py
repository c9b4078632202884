"""megatron-sfr convert: what it prints, and one line where something is wrong."""

import argparse

import pytest
import yaml

from megatron_sfr.commands import convert
from megatron_sfr.hf.families import megatron_flags
from megatron_sfr.hf.folder import read_config
from tests.hf.models import save_model


def run(*words) -> int:
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(word) for word in words]))


def test_there_and_back(untied, tmp_path, capsys):
    assert run("import", "--hf", untied, "--output", tmp_path / "megatron", "--check") == 0
    said = capsys.readouterr()
    assert "47 tensors, 0.31 MB, float32, read back bit for bit" in said.out
    assert f"load: {tmp_path / 'megatron'}, finetune: true" in said.out
    assert "import: 100%" in said.err
    export = ("export", "--checkpoint", tmp_path / "megatron", "--like", untied, "--output", tmp_path / "hf")
    assert run(*export, "--check", untied, "--max-shard-gb", "0.0001") == 0
    said = capsys.readouterr()
    assert "47 tensors, 0.31 MB, float32, in 4 files" in said.out
    assert "0 rows of vocabulary padding cut off\nleft behind: nothing" in said.out
    assert "largest difference 0\n" in said.out
    assert "export: 100%" in said.err


def test_a_check_that_fails_is_an_error(imported, untied, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="is not the model of"):
        run("export", "--checkpoint", imported, "--like", untied, "--output", tmp_path / "hf", "--check", other)


def test_tolerance_of_no_check_is_an_error(imported, untied, tmp_path):
    with pytest.raises(ValueError, match="give --check"):
        run("export", "--checkpoint", imported, "--like", untied, "--output", tmp_path / "hf", "--tolerance", 1)


def test_recipe_is_yaml_of_the_flags(untied, capsys):
    assert run("recipe", "--hf", untied) == 0
    assert yaml.safe_load(capsys.readouterr().out) == megatron_flags(read_config(untied))
