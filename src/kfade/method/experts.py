"""Which experts of a mixture a step changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from kfade.method.step import Choose
from kfade.models.experts import ExpertMap
from kfade.models.targets import Target


def top_experts(targets: Sequence[Target], count: int | None) -> Choose | None:
    """Chooses in each layer of experts the ``count`` experts with the largest gᵀ(G̃ + λI)⁻¹g, summed
    over their matrices, and all other targets. None (no choice) where ``count`` is None."""
    if count is None:
        return None

    def choose(slopes: Mapping[str, float]) -> Collection[str]:
        chosen = {target.name for target in targets if not target.is_routed}
        layers: dict[int, dict[int, dict[str, float]]] = {}
        for target in targets:
            map_ = target.module
            if isinstance(map_, ExpertMap) and target.name in slopes:
                own = layers.setdefault(id(map_.layer), {}).setdefault(map_.expert, {})
                own[target.name] = slopes[target.name]
        for experts in layers.values():
            best = sorted(experts, key=lambda expert: -sum(experts[expert].values()))
            chosen.update(name for expert in best[:count] for name in experts[expert])
        return chosen

    return choose
