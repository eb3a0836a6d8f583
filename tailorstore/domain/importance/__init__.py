"""Learned importance: what leaving a layer out of a commit will have cost by the next one.

The damage ``c`` of a layer is what reverting it to its newest version would cost: its curvature-weighted drift, or,
where any moving layer lacks a second moment, the squared drift of all. At commit k it is known; wanted is that of
commit k + 1, once if the layer is left out and once if it is written. The importance is the difference, plus what
the error of a light version costs, which writing in full takes away.

The model. A layer last written ``S`` steps ago has gathered ``c / S`` a step. Over the ``N`` steps of the next interval
a random walk at this pace adds ``u = c N / S`` to what remains: ``r = c`` if left out, ``r = 0`` if written. Hence

    log c' = log(r + u) + q (δ + β) + (1 - q) ρ + γ log(1 + 2 √(r u) / (r + u)),     q = u / (r + u)

- ``δ`` corrects the pace: a linear function of the logarithms (to the pace, so that no layer's scale matters) of the
  age in intervals, of what the last interval added, of the damage after the newest single interval, and of the
  optimizer's present update, further of the learning rate's trend and of the layer's depth in the model;
- ``β`` is the layer's own intercept: learned from what the shared part leaves over, and drawn towards 0;
- ``ρ`` changes what remains (the second moments move, layers drift back): a constant and the learning rate's trend;
- ``γ`` is 0 for a random walk and 1 for a layer that keeps its direction.

It is linear in its 10 shared weights, so both cases come from one ridge regression on ``log c' - log(r + u)``, over all
layers and commits with exponential forgetting, outliers clipped. Without experience all corrections are 0.
Of several figures that tell the same only one is used: beside these, trends of gradients and of second moments made
predictions on real runs no better.

It looks one interval ahead. What writing saves lasts until the layer is written again, which for a layer that gathers
damage slowly is long: whoever ranks layers by it for many commits does better by importance times age.

The trust. Each prediction is scored one commit later, in the case that came true, against "what is will be" (``c`` of
a layer left out, ``u`` of a written one). Predictions are given out once both cases were seen at 8 commits, and while
the mean error of the logarithm is under 0.8 of that rule's and under log 2. Equal inputs give equal predictions.
"""

from tailorstore.domain.importance.learner import Calibration, Importance

__all__ = ["Calibration", "Importance"]
