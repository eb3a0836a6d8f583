"""From a DeepSpeed engine into a store."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, overload

from tailorstore.adapters.deepspeed.progress import with_progress
from tailorstore.adapters.deepspeed.state import Unsharded, state_of
from tailorstore.domain.mask import Mask
from tailorstore.domain.records import Commit
from tailorstore.engine.pending import PendingCommit
from tailorstore.engine.ranks.together import together
from tailorstore.engine.store import Store

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@overload
def commit(
    store: Store,
    step: int,
    engine: "DeepSpeedEngine",
    mask: Mask = None,
    *,
    extra: Mapping[str, Any] | None = None,
    metrics: Mapping[str, SupportsFloat] | None = None,
    message: str | None = None,
    block: Literal[True] = True,
) -> Commit: ...
@overload
def commit(
    store: Store,
    step: int,
    engine: "DeepSpeedEngine",
    mask: Mask = None,
    *,
    extra: Mapping[str, Any] | None = None,
    metrics: Mapping[str, SupportsFloat] | None = None,
    message: str | None = None,
    block: Literal[False],
) -> PendingCommit: ...
def commit(
    store: Store,
    step: int,
    engine: "DeepSpeedEngine",
    mask: Mask = None,
    *,
    extra: Mapping[str, Any] | None = None,
    metrics: Mapping[str, SupportsFloat] | None = None,
    message: str | None = None,
    block: bool = True,
) -> Commit | PendingCommit:
    """Publish an engine's layers as of a step; every rank calls it, between steps.

    Gradients that were accumulated since the last step are not part of a commit.

    Args:
        store: opened on every rank.
        step: after the step of the branch's newest commit; ``engine.global_steps``, as a rule.
        engine: what ``deepspeed.initialize`` returned first, with ZeRO and an optimizer.
        mask: as for ``store.commit``.
        extra: a dictionary of what else is to be kept; the engine's counters, learning rate schedule and loss scale go
            beside it, under ``"@deepspeed"``.
        metrics: as for ``store.commit``.
        message: as for ``store.commit``.
        block: as for ``store.commit``.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        InvalidInputError: an engine that cannot be taken apart, or slots that belong to no parameter; says why.
        TailorError: as ``store.commit``. In all cases nothing of the commit is visible.
    """
    with together(store.ranks(), f"describing the engine at step {step}"):
        state = state_of(engine)
        optim = state.optim()
        kept = with_progress(extra, engine)
    model = Unsharded(state)
    if block:
        return store.commit(step, model, optim, mask, extra=kept, metrics=metrics, message=message)
    return store.commit(step, model, optim, mask, extra=kept, metrics=metrics, message=message, block=False)
