"""The method: fit, gradient, direction and size of each step, and the update that results."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from kfade.curvature.curvature import Curvature
from kfade.curvature.estimators import KFAC, Estimator
from kfade.curvature.product import gauss_newton_product
from kfade.curvature.vectors import Divided, Vector
from kfade.data.batches import Batch
from kfade.data.noise import has_copies
from kfade.data.sequences import LEAST_PROMPT, TokenSequence, digest_sequences
from kfade.errors import InputError
from kfade.method.choose import damped
from kfade.method.correct import Corrector
from kfade.method.experts import top_experts
from kfade.method.gauge import Gauge
from kfade.method.gauges import Gauges, gauges_of
from kfade.method.gradient import forget_gradient
from kfade.method.objectives import Objective
from kfade.method.record import Candidate, StepRecord, amended, ends_of
from kfade.method.refine import Directions
from kfade.method.sampling import Sampler
from kfade.method.search import UnreachedError
from kfade.method.settings import DEFAULT_BOUND, DEFAULT_KL, KNOWN_LOSS, Direction, Run
from kfade.method.size import NoRiseError, StepSize, shortfall
from kfade.method.step import NoGradientError
from kfade.method.trial import Trial
from kfade.method.update import Update
from kfade.models.interface import check_model, check_sets
from kfade.models.layers import find_targets
from kfade.models.targets import Target
from kfade.models.weights import parameter_names, weight_digests
from kfade.runtime import distributed
from kfade.runtime.progress import say
from kfade.runtime.provenance import versions
from kfade.runtime.stages import stage


def unlearn(
    model: nn.Module,
    *,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    fit: Estimator = KFAC(),
    direction: Direction = Direction(),
    size: StepSize = StepSize(kl=DEFAULT_KL),
    run: Run = Run(),
) -> Update:
    """K-FADE: a few uphill Gauss-Newton steps on the forget set (paper §3).

    Each step fits G̃ on ``retain`` at the current weights, computes the gradient g of the objective
    on a batch of ``forget``, and changes the weights by α r/‖r‖_G̃ with r = (G̃ + λI)⁻¹g. The model
    is left bit-identical; the change of its weights is returned.

    Args:
        held_out: retain sequences that no fit uses; KL is measured on them.
        fit: estimator of the curvature, with its settings.
        direction: objective, damping and refinement of each step, see
            :class:`~kfade.method.settings.Direction`.
        size: how far to go, see :class:`~kfade.method.size.StepSize`.
        run: targets, number of steps, memory, seed, see :class:`~kfade.method.settings.Run`.

    Raises:
        InputError: an empty set; a target or a model that is not supported; a token or a length
            that the model does not read; a KL that is too small to tell from rounding in the
            model's dtype; numbers that are not finite.
    """
    targets = list(run.targets) if run.targets is not None else find_targets(model)
    check_model(model, targets)
    _check_data(model, forget, retain, held_out, run.forget_batch)
    sampler = Sampler(model, targets, batch_tokens=run.batch_tokens, seed=run.seed)
    gauges = gauges_of(model, targets, sampler, forget, held_out, direction.objective, size, run)
    direction = _decided(direction, size, run, forget, gauges.begin.forget_loss)
    size, run = size.decided(gauges.whole.head.vocabulary), _divided(run, model)
    run = _with_first_share(run, size, gauges.begin.forget_loss)
    facts = base_facts(model, parameter_names(targets), forget, retain, held_out)
    update = run.start or Update({}, {**facts, "steps": []})
    spread = {name: getattr(direction, name) for name in ("bound", "noise", "at_prompts")}
    update = Update(update.deltas, {**update.provenance, **spread})
    update = update.to(targets[0].device).kept(run.storage)  # it may be in a file
    curvature = run.curvature and run.curvature.only([t.name for t in targets], targets[0].device)
    shared = _Shared(forget, retain, targets, sampler, gauges, fit, size, run)
    begin = None if update.deltas else (direction.objective, gauges.begin)
    while not _is_finished(update, run):
        index = len(update.provenance["steps"])
        trial = Trial(gauges, targets, update, direction, size, run.share(index), begin)
        update = trial.update
        if curvature is None or (run.refit and index > 0 and not trial.is_beyond):
            curvature = shared.fitted(update, index)
        direction, update, found = shared.tried(trial, direction, update, curvature)
        is_over = found is None
        if found is not None:
            update = _after(update, *found).kept(run.storage)
            begin = trial.ended
            if _has_gone_all_the_way(update, size, run):  # as a part of the data may say
                update = gauges.confirmed(update, trial.objective)
                is_over = _has_gone_all_the_way(update, size, run)
        objective = trial.objective
        del trial, found  # before a correction or a later fit
        if is_over:
            update = shared.ended(update, curvature, index, objective)
        if run.on_step is not None:
            run.on_step(update)
    return update


@dataclass(frozen=True)
class _Shared:
    """What all steps of a run share."""

    forget: Sequence[TokenSequence]
    retain: Sequence[TokenSequence]
    targets: Sequence[Target]
    sampler: Sampler
    gauges: Gauges
    fit: Estimator
    size: StepSize
    run: Run

    def fitted(self, update: Update, index: int) -> Curvature:
        """The fit for the step ``index``, counted from 0: at the weights that ``update`` makes in a
        run with refits, else at the original ones."""
        run, gauge = self.run, self.gauges.whole
        at, seed = (update, run.seed + index) if run.refit else (Update({}), run.seed)
        with stage("fit"), gauge.applied(at) as model:
            return self.fit.fit(
                model,
                self.sampler.all(self.retain),
                self.targets,
                seed=seed,
                recompute=run.recompute,
                memory=run.memory,
                store=run.store(model, self.targets) if run.store is not None else None,
                head=gauge.head,
            )

    def drawn(self, index: int, noise: float = 0.0, prompts: bool = False) -> list[Batch]:
        """Forget batches of the step ``index``."""
        return self.sampler.draw(self.forget, self.run.forget_batch, index, noise, prompts)

    def tried(
        self,
        trial: Trial,
        direction: Direction,
        update: Update,
        curvature: Curvature,
    ) -> tuple[Direction, Update, Candidate | None]:
        """The best candidate for a step, None if the steps before have gone all the way, left no
        gradient, or left no length that does what is asked; with the damping in the direction and
        in the update's provenance, if it was chosen now."""
        index, run, gauge = len(update.provenance["steps"]), self.run, self.gauges.whole
        if trial.is_beyond:
            say(f"step {index + 1}: the steps before have gone all the way, so the run ends here")
            return direction, update, None
        gradient = self._gradient(direction, update, trial.objective)
        whole = None
        if direction.at_prompts:
            everywhere = replace(direction, at_prompts=False)
            whole = partial(self._gradient, everywhere, update, trial.objective)
        refining = self.sampler.draw(self.retain, direction.refine_sequences, index)
        exact = _exact_product(gauge, update, self.targets, refining, run)
        try:
            direction, update = damped(
                direction, update, curvature, gradient, self.targets, self.gauges, run, whole
            )
            directions = _directions(curvature, gradient, exact, self.targets, direction, run)
            del gradient  # the directions let it go when they need it no longer
            return direction, update, trial.best(directions)
        except (NoGradientError, NoRiseError, UnreachedError) as error:
            if index == 0 and direction.at_prompts and isinstance(error, NoGradientError):
                raise InputError(
                    "--at-prompts: no gradient of the forget set's prompts reaches the targeted "
                    "weights; the last block of a model never has one: leave the option out, or "
                    "target earlier blocks"
                ) from error
            if index == 0:
                raise
            say(f"step {index + 1}: {error.what}, so the run ends here")
            return direction, amended(update, ended_by=error.what), None

    def _gradient(self, direction: Direction, update: Update, objective: Objective) -> Vector:
        """The forget gradient of the next step, at the weights that ``update`` makes."""
        gauge, index = self.gauges.whole, len(update.provenance["steps"])
        batches = self.drawn(index, direction.noise or 0.0, direction.at_prompts)
        with stage("gradient"), gauge.applied(update) as model:
            return forget_gradient(
                model,
                batches,
                self.targets,
                objective,
                weigh=index > 0 and bool(direction.weigh_texts),
                head=gauge.head,
                **self.run.passes,
            )

    def ended(
        self,
        update: Update,
        curvature: Curvature,
        index: int,
        objective: Objective,
    ) -> Update:
        """The update at the end of a run: within its size, corrected, and marked if early."""
        gauges, targets, run, size = self.gauges, self.targets, self.run, self.size
        update = gauges.settled(update, objective, size)
        first, now = ends_of(update.provenance["steps"])
        if size.has_risen(first, now) and shortfall(size, first, now) > 0:
            risen = f"{now.forget_loss - first.forget_loss:.1f} nats/token"
            why = f"the forget loss has risen by {risen}, of at most {size.max_rise:.1f}"
            say(f"{why}, so the run ends here")
            update = amended(update, ended_by=why)
        corrector = Corrector(gauges.whole, targets, self.sampler, self.retain, size, run)
        update = corrector.correct(update, curvature, self.drawn(index))
        return amended(update, ended=len(update.provenance["steps"]) < run.steps)


def _decided(
    direction: Direction,
    size: StepSize,
    run: Run,
    forget: Sequence[TokenSequence],
    loss: float,
) -> Direction:
    """The direction with all its settings; says where texts that are not known by heart have no
    bound, and where no text has a copy, or a prompt.

    What was left out is as in the steps before, if the run continues from some.

    Args:
        loss: mean loss of the forget texts before the run.
    """
    begun = run.start.provenance if run.start is not None else {}
    bound = begun.get("bound") if direction.bound is None else direction.bound
    noise = begun.get("noise") if direction.noise is None else direction.noise
    direction = replace(direction, bound=bound, noise=noise)
    known = direction.decided(size, run.steps, loss=0.0)
    direction = direction.decided(size, run.steps, loss)
    if direction.bound != known.bound:
        say(
            f"{_not_known(loss)}, so by default there is no bound and no noise; "
            f"--bound {DEFAULT_BOUND:g} gives both"
        )
    if direction.at_prompts and not any(sequence.prompt for sequence in forget):
        say(
            f"note: no text of the forget set has a prompt of {LEAST_PROMPT} tokens or more, so "
            "the gradient is of all positions"
        )
        direction = replace(direction, at_prompts=False)
    if direction.noise and not has_copies(forget, direction.noise):
        say(
            "note: the answers of the forget set are too short for copies with noise "
            f"{direction.noise:g}, so the gradient has none"
        )
        return replace(direction, noise=0.0)
    return direction


def _with_first_share(run: Run, size: StepSize, loss: float) -> Run:
    """The run with the share of its first step; says where that is more than an equal part by
    default.

    Args:
        loss: mean loss of the forget texts before the run.
    """
    decided = run.decided(loss)
    is_begun = run.start is not None and bool(run.start.deltas)
    if decided != run and decided.share(0) > 1 / run.steps and size.alpha is None and not is_begun:
        say(
            f"{_not_known(loss)}, so by default the first step goes {decided.share(0):g} of the "
            "way; --first-share sets that"
        )
    return decided


def _not_known(loss: float) -> str:
    """Begins a note that texts with that mean loss are not known by heart."""
    return (
        f"note: the forget texts are not known by heart (a mean loss of {loss:.4f} nats/token, "
        f"not below {KNOWN_LOSS:.4f})"
    )


def _has_gone_all_the_way(update: Update, size: StepSize, run: Run) -> bool:
    """Whether all steps are done, or the size of the run is reached before."""
    steps = update.provenance["steps"]
    return len(steps) == run.steps or size.is_reached(*ends_of(steps))


def _is_finished(update: Update, run: Run) -> bool:
    """Whether all steps are done, or the run ended early; older versions did not record that."""
    steps = update.provenance["steps"]
    return bool(steps) and (steps[-1].get("ended", False) or len(steps) == run.steps)


def _divided(run: Run, model: nn.Module) -> Run:
    """The run, with vectors that are spread over the processes where the model is."""
    storage = Divided(run.storage) if distributed.is_sharded(model) else run.storage
    return replace(run, storage=storage)


def _directions(
    curvature: Curvature,
    gradient: Vector,
    exact: Callable[[Vector], MutableMapping[str, Tensor]],
    targets: Sequence[Target],
    direction: Direction,
    run: Run,
) -> Directions:
    """The directions of a step, as ``direction`` asks for them."""
    assert direction.damping is not None, "the damping is decided"
    return Directions(
        curvature,
        gradient,
        exact,
        damping=direction.damping,
        iterations=direction.refine,
        storage=run.storage,
        choose=top_experts(targets, direction.top_experts),
    )


def _exact_product(
    gauge: Gauge,
    update: Update,
    targets: Sequence[Target],
    batches: Sequence[Batch],
    run: Run,
) -> Callable[[Vector], MutableMapping[str, Tensor]]:
    """δ ↦ Gδ with the exact G of ``batches`` at the weights that ``update`` makes."""

    def product(delta: Vector) -> MutableMapping[str, Tensor]:
        with gauge.applied(update) as model:
            return gauss_newton_product(
                model, batches, targets, delta, **run.passes, head=gauge.head
            )

    return product


def _after(update: Update, record: StepRecord, changes: Vector) -> Update:
    """The update with one more step."""
    records = [*update.provenance["steps"], asdict(record)]
    update = update.plus(changes, record.alpha)
    return Update(update.deltas, {**update.provenance, "steps": records})


def base_facts(
    model: nn.Module,
    names: Sequence[str],
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
) -> dict[str, Any]:
    """Provenance of an update of the parameters ``names``: digests of the model and the data."""
    return {
        "architecture": type(model).__name__,
        **weight_digests(model, "weights", names),
        "forget_sha256": digest_sequences(forget),
        "retain_sha256": digest_sequences(retain),
        "held_out_sha256": digest_sequences(held_out),
        "versions": versions(),
    }


def _check_data(
    model: nn.Module,
    forget: Sequence[TokenSequence],
    retain: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    forget_batch: int | None,
) -> None:
    check_sets(model, {"forget set": forget, "retain set": retain, "held-out retain set": held_out})
    if forget_batch is not None and not 1 <= forget_batch <= len(forget):
        raise InputError(f"--forget-batch {forget_batch}: the forget set has {len(forget)}")
