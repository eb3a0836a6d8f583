"""From a composite into a DeepSpeed engine of any ZeRO stage and world size, each rank reading its own part."""

from typing import TYPE_CHECKING, Any

import torch

from tailorstore.adapters.deepspeed.plan import Plan
from tailorstore.adapters.deepspeed.progress import compare_progress, set_progress, without_progress
from tailorstore.adapters.deepspeed.state import EngineState, state_of
from tailorstore.engine.checkout import Checkpoint
from tailorstore.engine.ranks.together import together
from tailorstore.engine.tensors.restore import raise_mismatch

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def restore(checkpoint: Checkpoint, engine: "DeepSpeedEngine", *, strict: bool = True, rng: bool = False) -> Any:  # noqa: ANN401
    """Fill an engine in place and return the caller's extra state; every rank calls it.

    Stage, world size and precision may be others than those of the engine that was committed, and the composite may be
    one of a plain model and optimizer. Each rank reads the chunks that its own part needs, straight into it. DeepSpeed
    has one step counter for many layers: where they come from different steps, it becomes the newest one's.

    Args:
        checkpoint: from ``store.checkout`` on every rank.
        engine: with the parameter groups of the one that was committed; no step may be under way.
        strict: refuse missing and unexpected names, other dtypes (of a weight with a master, the master's counts),
            another optimizer and another scheduler. Shapes and groups must always agree.
        rng: also set the states of the random number generators.

    Returns:
        What was passed to ``commit`` as ``extra``; ``{}`` where nothing was.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        InvalidInputError: an engine that cannot be taken apart; says why.
        RestoreMismatchError: lists every difference at once. Nothing was changed.
        MissingObjectError, DigestMismatchError, CorruptDocumentError: an object is gone or not what was written; the
            engine may be overwritten in part, so restore another step before training on.
    """
    contents, joined = checkpoint.contents, checkpoint.ranks()
    what = f"the composite of step {checkpoint.step} on {checkpoint.commit.branch!r}"
    with together(joined, f"comparing {what} with the engine"):
        state = state_of(engine)
        extra, progress = without_progress(contents.extra_part("extra", {}))
        plan = Plan(contents, state, strict=strict)
        plan.match_weights()
        plan.match_states(engine.module)
        plan.match_optimizer(checkpoint.sources)
        if strict and progress is not None:
            compare_progress(engine, progress, plan.problems)
        raise_mismatch(plan.problems, what)
    _free_gathered(engine)
    with together(joined, f"reading {what}"):
        checkpoint.read_into(plan.pairs)
        for finish in plan.finish:
            finish()
        if progress is not None:
            set_progress(engine, progress)
        if rng:
            checkpoint.restore_rng()
    _round_masters(engine, state)
    return extra


def _free_gathered(engine: "DeepSpeedEngine") -> None:
    """Let ZeRO 3 drop the parameters that it keeps gathered: they would go on to hold what was."""
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


def _round_masters(engine: "DeepSpeedEngine", state: EngineState) -> None:
    """Give the model the weights that its masters round to, as a step does; collective."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
        # Its own views of the slots, for safe_get_full_optimizer_state, are made anew after the next step.
        wrapper._hp_optimizer_states_linked = False  # noqa: SLF001
        return
    with torch.no_grad():
        for weights, partition in zip(wrapper.fp16_partitioned_groups_flat, state.partitions.flats, strict=True):
            weights.copy_(partition.master)
    wrapper.checkpoint_event_epilogue()
