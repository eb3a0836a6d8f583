"""What the ids that scripts give their checkpoints say of steps."""

import os
import re

_STEP = re.compile(r"(?:^|.*[-_=/\\])([0-9]+)[/\\]?")


def step_in(checkpoint_id: str | os.PathLike[str] | int) -> int | None:
    """Return the step that a checkpoint's id ends in; ``None`` if it ends in none.

    Examples:
        >>> step_in("runs/7/step-1200"), step_in("global_step_40/"), step_in(1200), step_in("epoch=1-step=30")
        (1200, 40, 1200, 30)
        >>> step_in("latest"), step_in("v2")
        (None, None)
    """
    found = _STEP.fullmatch(os.fspath(checkpoint_id) if not isinstance(checkpoint_id, int) else str(checkpoint_id))
    return int(found[1]) if found else None
