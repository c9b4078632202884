"""A loss that registers itself is found by name and by dotted path, and the common tests run it. Wrong losses fail."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sfr.objectives.token import registry
from megatron_sfr.objectives.token.gem import GEM
from megatron_sfr.objectives.token.loss_base import TokenLoss
from megatron_sfr.objectives.token.registry import LOSSES, find_loss, register
from tests.objectives.token import common_checks
from tests.objectives.token.token_cases import all_losses, differentiated, labels, logits

ROOT = Path(__file__).parents[3]
FOCAL = "tests.objectives.token.focal"


@pytest.fixture(autouse=True)
def scope(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "LOSSES", dict(LOSSES))
    return


def test_the_common_tests_find_a_new_loss_and_fail_a_wrong_one_by_name() -> None:
    """Runs test_all_losses.py as it is, with two more losses registered: one right, one with a wrong gradient."""
    plugin, file = "tests.objectives.token.added_losses", Path(__file__).with_name("test_all_losses.py")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", plugin, str(file), "-k", "poly or wrong"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    outcomes = [line.split(" - ")[0].split("::")[-1] for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert outcomes == ["test_every_loss[wrong-equals_its_definition]"], done.stdout[-3000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert sum("poly" in line for line in passed) == len(common_checks.CHECKS) + 1
    assert done.returncode == 1


@dataclass(frozen=True)
class Centred(TokenLoss):
    """Depends on the other tokens of the batch."""

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        loss_T = torch.nn.functional.cross_entropy(z_TV, y_T, reduction="none")
        return loss_T - loss_T.mean()


@dataclass(frozen=True)
class Overflowing(TokenLoss):
    """Sums exponentials without subtracting the largest logit."""

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        return z_TV.exp().sum(-1).log() - z_TV.gather(1, y_T[:, None])[:, 0]


@pytest.mark.parametrize(
    ("loss", "check"),
    [
        (Centred(), common_checks.a_tokens_loss_depends_on_its_own_logits_only),
        (Overflowing(), common_checks.g10_logits_of_10_000_stay_finite),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, TokenLoss) else "",
)
def test_a_wrong_loss_in_plain_torch_fails_its_check(loss: TokenLoss, check: Callable[[TokenLoss], None]) -> None:
    with pytest.raises(AssertionError):
        check(loss)


@dataclass(frozen=True)
class Mean(TokenLoss):
    """Returns a scalar."""

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(z_TV, y_T)


@dataclass(frozen=True)
class Constant(TokenLoss):
    """Has no gradient."""

    def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
        return torch.zeros(len(y_T), dtype=z_TV.dtype)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Mean(), r"Mean.loss returned shape \(\) for 4 tokens: return one loss per token, \[T\]"),
        (Constant(), "Constant.loss does not depend on the logits"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(loss: TokenLoss, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        differentiated(logits(4, 5), labels(4, 5), loss)


def test_a_registered_loss_is_found_by_name_and_by_dotted_path() -> None:
    assert find_loss("gem") == find_loss("megatron_sfr.objectives.token.gem.GEM") == "gem"
    assert find_loss(f"{FOCAL}.Focal") == "focal"
    assert all_losses()["gem-logsigmoid"] == GEM(h="logsigmoid", beta=0.6, slope=0.4)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("jem", r"invalid choice: 'jem' \(choose from asft, ce, dft, eaft, focal, gem, sed, tofu, or give the dotted"),
        ("nowhere.at.all.Loss", r"importing nowhere.at.all failed: ModuleNotFoundError: .*is its folder on PYTHONPATH"),
        (f"{FOCAL}.Vocal", f"{FOCAL} has no Vocal"),
        (f"{FOCAL}.NotRegistered", r"NotRegistered is not a registered loss; decorate it with @register\(NAME\)"),
        ("tests.objectives.token.shard_program.COLUMNS", "COLUMNS is not a registered loss"),
    ],
)
def test_a_loss_that_is_not_there_is_reported_in_one_line(objective: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        find_loss(objective)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_users_module_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_loss.py").write_text("import torch\n\nraise RuntimeError('first line\\nsecond line')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"importing faulty_loss failed: RuntimeError: first line second line$"):
        find_loss("faulty_loss.Loss")


def test_what_cannot_be_registered_is_refused() -> None:
    class Plain(TokenLoss):
        def loss(self, z_TV: Tensor, y_T: Tensor) -> Tensor:
            return z_TV.sum(-1)

    @dataclass(frozen=True)
    class Abstract(TokenLoss):
        pass

    with pytest.raises(ValueError, match=r"write @dataclass\(frozen=True\) between @register and Plain"):
        register("plain")(Plain)
    with pytest.raises(ValueError, match="derive Abstract from TokenLoss and define its method `loss`"):
        register("abstract")(Abstract)
    with pytest.raises(ValueError, match=r"loss 'gem' is registered already, by megatron_sfr.objectives.token.gem.GEM"):
        register("gem")(Mean)
    with pytest.raises(ValueError, match="loss 'My-Loss': a name has lower-case letters"):
        register("My-Loss")
