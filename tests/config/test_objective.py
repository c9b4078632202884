"""--objective selects a registered loss, or the user's own by its dotted path, and builds it from its own options."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from megatron_sfr.config.objective import selected_loss
from megatron_sfr.config.settings import Parser, read_settings
from megatron_sfr.objectives.token.gem import GEM
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES, register
from megatron_sfr.objectives.token.sed import SED
from tests.config.test_settings import write

FOCAL = "tests.objectives.token.focal.Focal"


def loss_of(argv: list[str]) -> tuple[str, TokenLoss]:
    settings = read_settings(argv)
    return selected_loss(Parser().read(settings.flags))


def test_a_loss_is_built_from_its_own_options(tmp_path: Path) -> None:
    assert loss_of(write(tmp_path, objective="gem", gem_beta=0.5)) == ("gem", GEM(beta=0.5))
    assert loss_of([*write(tmp_path, objective="sed"), "--sed-threshold", "0.3"]) == ("sed", SED(0.3))


def test_a_users_own_loss_is_read_from_the_recipe_with_its_options(tmp_path: Path) -> None:
    argv = write(tmp_path, objective=FOCAL, focal_gamma=3.0)
    name, loss = loss_of(argv)
    assert (name, vars(loss)) == ("focal", {"gamma": 3.0})
    recipe = read_settings(argv).recipe
    assert (recipe["objective"], recipe["focal_gamma"]) == (FOCAL, 3.0)
    (tmp_path / "saved.yaml").write_text(yaml.safe_dump(recipe))
    assert read_settings(["--recipe", str(tmp_path / "saved.yaml")]).recipe == recipe


def test_a_users_own_loss_is_selected_by_a_flag(tmp_path: Path) -> None:
    assert loss_of([*write(tmp_path), "--objective", FOCAL, "--focal-gamma", "1.5"])[1].gamma == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gem_beta": 0.5}, "gem_beta is an option of objective gem and has no effect with objective ce: leave it out"),
        ({"objective": "gem", "sed_threshold": 0.5}, "sed_threshold is an option of objective sed and has no effect"),
        ({"objective": FOCAL, "gem_h": "logsigmoid"}, "gem_h is an option of objective gem and has no effect with"),
        ({"objective": FOCAL, "focal_gamma": 0.5}, r"recipe.yaml: focal_gamma = 0.5: give at least 1$"),
        ({"objective": FOCAL, "focal_gama": 2.0}, r"unknown key 'focal_gama'; did you mean focal_gamma\?"),
        ({"objective": "no_such_package.Loss"}, r"recipe.yaml: objective no_such_package.Loss: importing no_such_pa"),
        ({"objective": f"{FOCAL}s"}, r"recipe.yaml: objective .*Focals: tests.objectives.token.focal has no Focals"),
    ],
)
def test_wrong_options_are_reported_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_settings(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Clashing(TokenLoss):
    """Its option would have the name of an option of SFR."""

    draws: int = 1

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        return z_TV.sum(-1)


def test_a_loss_whose_flags_exist_already_is_refused() -> None:
    register("sfr")(Clashing)
    try:
        with pytest.raises(ValueError, match=r"Clashing: its options cannot become flags: .*conflicting .*-draws"):
            Parser()
    finally:
        del LOSSES["sfr"]
