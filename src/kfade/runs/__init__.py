"""A configuration becomes a folder: what the commands do, for scripts and notebooks.

config = RunConfig(
    model=ModelConfig("HuggingFaceTB/SmolLM2-135M-Instruct"),
    data=DataConfig(forget="forget.jsonl", retain="retain.jsonl"),
    size=SizeConfig(kl=0.02),
)
metrics = kfade.runs.unlearn(config, Path("out/run"))
"""

from kfade.runs.attacking import AttackRequest, attack
from kfade.runs.baselines import (
    BaselineRequest,
    LossConfig,
    TrainingConfig,
    WeightsConfig,
    baseline,
)
from kfade.runs.config import (
    DataConfig,
    FitConfig,
    ModelConfig,
    RefinementConfig,
    RunConfig,
    SizeConfig,
    StepConfig,
    read_config,
)
from kfade.runs.editing import LoraRequest, apply, export_lora, merge, revert
from kfade.runs.fitting import fit
from kfade.runs.sweeping import sweep
from kfade.runs.unlearning import unlearn

__all__ = [
    "unlearn", "fit", "sweep", "apply", "revert", "merge", "export_lora", "LoraRequest",
    "baseline", "BaselineRequest", "LossConfig", "TrainingConfig", "WeightsConfig",
    "attack", "AttackRequest",
    "RunConfig", "ModelConfig", "DataConfig", "FitConfig", "StepConfig", "RefinementConfig",
    "SizeConfig", "read_config",
]  # fmt: skip
