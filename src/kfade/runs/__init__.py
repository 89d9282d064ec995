"""The commands as functions, for scripts and notebooks: settings in, a folder of results out.

config = RunConfig(
    model=ModelConfig("HuggingFaceTB/SmolLM2-135M-Instruct"),
    data=DataConfig(forget="forget.jsonl", retain="retain.jsonl"),
    size=SizeConfig(kl=0.02),
)
metrics = kfade.runs.unlearn(config, Path("out/run"))
"""

from kfade.runs.attacking import AttackRequest, attack
from kfade.runs.baseline_config import (
    BaselineRequest,
    LossConfig,
    TrainingConfig,
    WeightsConfig,
)
from kfade.runs.baselines import baseline
from kfade.runs.checking import CheckRequest, check
from kfade.runs.config import (
    DataConfig,
    FitConfig,
    FitRequest,
    ModelConfig,
    RunConfig,
    TemplateConfig,
    read_config,
)
from kfade.runs.demonstrating import demo
from kfade.runs.editing import LoraRequest, apply, export_lora, merge, revert
from kfade.runs.eval_choice import ChoiceRequest, evaluate_choice
from kfade.runs.eval_judge import BenchRequest, JudgeConfig, evaluate_mt_bench
from kfade.runs.eval_kl import KlRequest, evaluate_kl
from kfade.runs.eval_memorisation import MemorisationRequest, evaluate_memorisation
from kfade.runs.eval_quantisation import evaluate_quantisation
from kfade.runs.eval_tofu import TofuRequest, aggregate_tofu, evaluate_tofu
from kfade.runs.evaluation import Subject
from kfade.runs.fitting import fit
from kfade.runs.planning import PlanRequest, plan
from kfade.runs.reporting import report
from kfade.runs.step_config import CorrectionConfig, RefinementConfig, SizeConfig, StepConfig
from kfade.runs.sweep_config import SweepRequest
from kfade.runs.sweeping import sweep
from kfade.runs.unlearning import unlearn

__all__ = [
    "unlearn", "fit", "FitRequest", "sweep", "SweepRequest", "plan", "PlanRequest",
    "check", "CheckRequest", "demo", "report",
    "apply", "revert", "merge", "export_lora", "LoraRequest",
    "baseline", "BaselineRequest", "LossConfig", "TrainingConfig", "WeightsConfig",
    "attack", "AttackRequest",
    "evaluate_kl", "KlRequest", "evaluate_tofu", "aggregate_tofu", "TofuRequest",
    "evaluate_choice", "ChoiceRequest", "evaluate_mt_bench", "BenchRequest", "JudgeConfig",
    "evaluate_memorisation", "MemorisationRequest", "evaluate_quantisation",
    "Subject", "TemplateConfig",
    "RunConfig", "ModelConfig", "DataConfig", "FitConfig", "StepConfig", "RefinementConfig",
    "CorrectionConfig", "SizeConfig", "read_config",
]  # fmt: skip
