"""What the study compares: its arms, the settings that are tried for them, the seeds, and how replies are sampled."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_sfr.evaluation.compare.report import Axes

Settings = Mapping[str, object]  # options of a recipe

AXES = (Axes("style fidelity", "CS-SB-1"), Axes("relevance", "self-BLEU-4"))
BASELINE = "CE"
CHOOSING_SEED = 100  # trains the runs that settings are chosen by; no run that is judged has it


@dataclass(frozen=True)
class Arm:
    """One way to train. recipe: a file of ../arms over ../ce.yaml. tried: settings, of which one is chosen.

    like: arms whose chosen settings this one takes over, so that it differs from them in nothing but its own recipe.
    baseline: whether other arms are compared with it, which takes more temperatures.
    """

    name: str
    recipe: str | None = None
    tried: tuple[Settings, ...] = ({},)
    like: tuple[str, ...] = ()
    baseline: bool = False

    @property
    def slug(self) -> str:
        return re.sub(r"\W+", "_", self.name.lower())


@dataclass(frozen=True)
class Regime:
    """How much text an arm is trained on, and how.

    recipe: a file of this folder over those of the arms. steps: unless the command gives others. least: with fewer, SFR
    would hardly act. settings: those of each arm, fixed before the runs; None: chosen on other headwords.
    """

    name: str
    per_persona: int
    steps: int
    least: int
    recipe: str | None = None
    settings: Mapping[str, Settings] | None = field(default=None, hash=False)
    lora: bool = False


SHORT = {"sfr_grad_ratio": 0.3, "sfr_warmup_steps": 15, "sfr_ramp_steps": 10, "sfr_measure_interval": 5}
WIDE = Regime("wide", per_persona=4000, steps=150, least=100)
REGIMES = (
    WIDE,
    Regime("scarce", per_persona=50, steps=60, least=40, recipe="scarce", settings={"SFR": SHORT}),
    Regime("lora", per_persona=50, steps=60, least=40, recipe="lora", settings={"SFR": SHORT}, lora=True),
)
ARMS = (
    Arm(BASELINE, baseline=True),
    Arm("SFR", "sfr", tuple({"sfr_grad_ratio": ratio} for ratio in (0.1, 0.3, 1.0))),
    Arm("SFR-pre", "sfr_precondition", like=("SFR",)),
    Arm("SFR-mse", "sfr_mse", like=("SFR",)),
    Arm("MTP", "mtp", tuple({"mtp_loss_scaling_factor": share} for share in (0.1, 0.3))),
    Arm("GEM", "gem", tuple({"gem_beta": beta} for beta in (0.7, 0.85))),
    Arm("SED", "sed"),
    Arm("GEM+SFR", "gem_sfr", ({"gem_h": "linear"},), like=("GEM", "SFR")),
)


def choose_arms(names: Sequence[str]) -> tuple[Arm, ...]:
    """The baseline and the named arms, in the order of ARMS. ValueError for a name that is not an arm."""
    if unknown := [name for name in names if name not in {arm.name for arm in ARMS}]:
        raise ValueError(f"{unknown[0]} is not an arm: choose from {', '.join(arm.name for arm in ARMS)}")
    return tuple(arm for arm in ARMS if arm.name in {BASELINE, *names})


@dataclass(frozen=True)
class Plan:
    """Size of the study. The defaults take an evening on two CPU cores."""

    seeds: tuple[int, ...] = (1, 2, 3)
    steps: int = WIDE.steps
    regime: Regime = field(default=WIDE, hash=False)
    temperatures: tuple[float, ...] = (0.4, 0.6, 0.8, 1.0)
    between: tuple[float, ...] = (0.5, 0.7, 0.9)
    """More temperatures of the baseline. A frontier is concave, so a line through few of its points lies below it, and
    an arm that only equals a baseline of another temperature would seem better."""
    headwords: int = 64
    """Largest number of headwords on each side: for choosing settings, and for judging arms."""
    samples: int = 4
    max_new_tokens: int = 64
    choosing_share: float = 0.25
    sampling_seed: int = 0
    arms: tuple[Arm, ...] = field(default=ARMS, hash=False)

    def __post_init__(self) -> None:
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: two or more different ones, or nothing tells noise from an effect")
        if CHOOSING_SEED in self.seeds:
            raise ValueError(f"seed {CHOOSING_SEED} trains the runs that settings are chosen by: judge other ones")
        if len(self.temperatures) < 2:
            raise ValueError("one temperature cannot tell diversity from a warmer model: give two or more")
        if self.steps < self.regime.least:
            raise ValueError(f"{self.steps} steps: arms with SFR warm up first, so give at least {self.regime.least}")
        if self.headwords < 2:
            raise ValueError(f"{self.headwords} headwords: give two or more, which are resampled")

    def sweep(self, arm: Arm, *, judging: bool) -> tuple[float, ...]:
        """The temperatures that an arm is sampled at."""
        more = self.between if judging and arm.baseline else ()
        return tuple(sorted((*self.temperatures, *more)))

    def find(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


@dataclass(frozen=True)
class Run:
    """One training: an arm with its settings and a seed."""

    arm: Arm
    settings: tuple[tuple[str, object], ...]
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Name of its folder, with its settings, steps and seed."""
        said = "".join(f"-{key.rpartition('_')[2]}{value}" for key, value in self.settings)
        return f"{self.arm.slug}{said}-{self.steps}-s{self.seed}"


def fixed(plan: Plan) -> dict[str, Settings] | None:
    """The settings of each arm in a regime that fixes them: the regime's, or the arm's first. None: to be chosen."""
    known = plan.regime.settings
    return None if known is None else {arm.name: known.get(arm.name, arm.tried[0]) for arm in plan.arms}


def candidates(plan: Plan) -> list[Run]:
    """The runs by which settings are chosen: the baseline, and every setting of an arm with more than one."""
    if fixed(plan) is not None:
        return []
    runs = [
        _run(arm, dict(tried), CHOOSING_SEED, plan) for arm in plan.arms if len(arm.tried) > 1 for tried in arm.tried
    ]
    return [_run(plan.find(BASELINE), {}, CHOOSING_SEED, plan), *runs] if runs else []


def judged(plan: Plan, chosen: Mapping[str, Settings]) -> list[Run]:
    """The runs that are judged: all arms of a seed before the next seed, so that a stopped study has complete seeds."""
    runs = []
    for seed in plan.seeds:
        for arm in plan.arms:
            settings: dict[str, object] = {}
            for name in (*arm.like, arm.name):
                settings |= chosen.get(name, {})
            runs.append(_run(arm, settings, seed, plan))
    return runs


def _run(arm: Arm, settings: Settings, seed: int, plan: Plan) -> Run:
    return Run(arm, tuple(sorted(settings.items())), seed, plan.steps)
