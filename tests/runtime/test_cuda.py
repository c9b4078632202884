"""What a run with CUDA changes in Megatron's flags, for what is installed; and the CPU backend beside CUDA packages.

No GPU is needed: CUDA is reported present, packages stand on sys.path or are reported absent.
"""

import importlib.metadata
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_sfr.config.settings import Parser
from megatron_sfr.model.gradient_fusion import SWITCH
from megatron_sfr.runtime import backend
from megatron_sfr.runtime.cpu import HIDDEN_PACKAGES, TORCH_ADAM
from megatron_sfr.runtime.devices import launching_on
from tests import warm

ROOT = Path(__file__).parents[2]
TINY = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--vocab-size 64 --micro-batch-size 2 --train-iters 1 --lr 1e-3 --train-data-path x --position-embedding-type rope "
    "--swiglu --normalization RMSNorm --disable-bias-linear"
).split()
EXTENSIONS = (*backend.SOFTMAX_KERNELS, backend.GRADIENT_KERNEL)
STAND_IN = """
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    def kernel(*_, **__):
        raise RuntimeError("no CUDA driver")
    return kernel
"""


def run(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def program(*arguments: str) -> Any:
    done = warm.run("-m", "tests.runtime.cuda_program", *arguments, ranks=1, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def has_distribution(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


def installed(monkeypatch: pytest.MonkeyPatch, *, engine: bool, extensions: bool) -> None:
    """Reports Transformer Engine and the extensions of Megatron and Apex as installed or absent."""
    monkeypatch.setattr(backend, "has_transformer_engine", lambda: engine)
    monkeypatch.setattr(backend, "is_importable", lambda *names: extensions and set(names) <= set(EXTENSIONS))


def changed(*flags: str) -> set[str]:
    return set(backend.adapt_flags("cuda", Parser().read(flags))[0]) - {"--transformer-impl"}


def test_without_transformer_engine_a_run_takes_the_local_spec_and_a_step_in_bf16() -> None:
    answer = program("flags", *TINY, "--bf16", "--mtp-num-layers", "1")
    assert answer["backend"] == "cuda"
    assert answer["loss"] == pytest.approx(4.2, abs=0.2)  # ln 64 and a little
    absent = "(Transformer Engine is not installed)"
    assert f"transformer_impl: transformer_engine -> local {absent}" in answer["changes"]
    assert f"apply_rope_fusion: True -> False {absent}" in answer["changes"]


@pytest.mark.parametrize("extensions", [False, True])
def test_with_transformer_engine_nothing_changes(extensions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, engine=True, extensions=extensions)
    assert changed("--bf16", "--fp8-format", "hybrid", "--context-parallel-size", "2") == set()


def test_the_local_spec_beside_transformer_engine_keeps_its_fused_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, engine=True, extensions=False)
    unfused = {"--no-persist-layer-norm", "--no-masked-softmax-fusion", "--no-gradient-accumulation-fusion"}
    assert changed("--transformer-impl", "local") == unfused
    installed(monkeypatch, engine=True, extensions=True)
    assert changed("--transformer-impl", "local") == {"--no-persist-layer-norm"}


def test_sharded_gradients_are_never_fused_without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, engine=True, extensions=False)
    assert changed("--use-megatron-fsdp") == {"--no-gradient-accumulation-fusion"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--fp8-format", "hybrid"),
            "--fp8 cannot work: Transformer Engine is not installed: .* leave --fp8-format out",
        ),
        (("--context-parallel-size", "2"), "--context-parallel-size cannot work: Transformer Engine is not installed"),
        (("--defer-embedding-wgrad-compute",), "fused_weight_gradient_mlp_cuda, which is not built: leave it out"),
    ],
)
def test_what_needs_an_absent_package_is_refused(
    flags: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, engine=False, extensions=False)
    with pytest.raises(ValueError, match=message):
        backend.adapt_flags("cuda", Parser().read(flags))


@pytest.mark.parametrize(("extensions", "fused"), [(False, (False, True)), (True, (True, False))])
def test_the_fusion_goes_off_in_the_output_layer_alone(
    extensions: bool, fused: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.transformer import TransformerConfig

    from megatron_sfr.model.builder import SFRModelConfig

    installed(monkeypatch, engine=True, extensions=extensions)
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "cuda_graph_modules": []}
    transformer = TransformerConfig(**sizes, gradient_accumulation_fusion=True)
    config = SFRModelConfig(transformer=transformer, vocab_size=8)
    backend.adapt_config("cuda", config)
    assert (config.transformer.gradient_accumulation_fusion, config.fuses_layers) == fused


def test_layers_that_accumulate_themselves_and_an_output_layer_that_does_not_give_the_same_gradients() -> None:
    answer = program("fusion")
    assert answer["switched"] == 1
    assert min(answer["norms"]) > 1
    assert max(answer["differences"]) < 1e-4


def test_upstream_still_passes_the_fusion_under_the_name_of_the_switch() -> None:
    from megatron.core.extensions import transformer_engine

    source = inspect.getsource(transformer_engine)
    assert source.count(f"{SWITCH}=self.config.gradient_accumulation_fusion") == 3  # linear, with a norm, grouped


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, str]:
    """The variable that puts importable stand-ins of HIDDEN_PACKAGES on sys.path; calling into one raises."""
    for name in HIDDEN_PACKAGES:
        for folder in (name, f"{name}/pytorch", f"{name}/optimizers", f"{name}/pytorch/optimizers"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "__init__.py").write_text(STAND_IN)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])}


LOOK = """
import sys
from megatron_sfr.train import main
try:
    main(["--recipe", sys.argv[1], "--no-such-flag"])
except ValueError as error:
    print(error)
from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, clip_grads
print(sys.modules["transformer_engine"], USING_PYTORCH_OPTIMIZER, clip_grads.l2_norm_impl.__module__)
"""


def test_training_on_cpu_imports_no_cuda_package_with_megatron(packages: dict[str, str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sfr_backend: cpu\n")
    assert run("-c", LOOK, str(recipe), **packages) == "None True megatron.core.utils"
    taken = "from transformer_engine.pytorch.optimizers import FusedAdam\nimport amp_C, apex.optimizers\nprint('taken')"
    assert run("-c", taken, **packages) == "taken"  # what upstream does otherwise


@pytest.mark.parametrize(("flags", "hidden"), [(("--sfr-backend", "cpu"), True), (("--sfr-backend", "cuda"), False)])
def test_the_backend_of_the_flags_hides_cuda(
    flags: tuple[str, ...], hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in HIDDEN_PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    backend.prepare(flags)
    assert [name in sys.modules for name in HIDDEN_PACKAGES] == [hidden] * len(HIDDEN_PACKAGES)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if hidden else "0")


def test_torch_s_adam_is_repaired_on_cuda_too() -> None:
    assert program("adam") == ["megatron_sfr.runtime.cpu"] * len(TORCH_ADAM)


@pytest.mark.skipif(not has_distribution("transformer-engine"), reason="needs Transformer Engine")
def test_transformer_engine_s_layers_have_the_switch() -> None:
    look = (
        "import inspect\nfrom transformer_engine import pytorch\n"
        "layers = pytorch.Linear, pytorch.LayerNormLinear, pytorch.GroupedLinear\n"
        f"print(all('self.{SWITCH} = {SWITCH}' in inspect.getsource(layer) for layer in layers))"
    )
    assert run("-c", look) == "True"


def test_triton_launches_on_the_gpu_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor may be on another GPU than the current one: `--device cuda:1`."""
    events: list[int | str] = []
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, lambda index: events.append(index) or 0)
    with FakeTensorMode():
        there, here = torch.empty(1, device="cuda:1"), torch.empty(1)
    for x in (there, here):
        with launching_on(x):
            events.append(x.device.type)
    assert events == [1, "cuda", 0, "cpu"]
