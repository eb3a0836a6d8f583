"""Strategies: objects that choose at each commit which layers it writes, and how. Pure functions of what is known.

Any of them is a ``mask=``, by itself or joined with others::

    store.commit(step, model, optim, mask=Budget("2GB", by="curvature").max_age(commits=5))

| strategy | writes |
|---|---|
| ``All()``, ``Light()`` | every layer, in full or light |
| ``Parity()`` | one half of the layers, the other half at the next commit |
| ``Filter(first, last, every)`` | the ends of each stack and the auxiliaries; the middle at every n-th commit |
| ``RoundRobin(k)`` | the next k layers |
| ``Staggered(n)`` | one n-th of the layers in full, the rest light |
| ``TopK(k, by)``, ``Threshold(above, by)`` | the layers of which a measure says most, or more than a bound |
| ``Budget(bytes_per_commit or bytes_per_hour, by)`` | the layers worth most within a budget |
| ``Union(a, b)``, ``Intersection(a, b)`` | what either chooses, what both choose; also written with the operators |
| ``a.max_age(commits, steps)`` | also what would get too old |
| ``a.anchor(every)`` | everything at every n-th commit |
| ``a.light_rest()`` | what is left out, light |

Those that go by a measure weight it by the layer's age, unless told otherwise: see :class:`Budget`.

Whatever they say, a layer that the branch has never stored is written in full, so the first commit is a full one;
a light version that is out of the question becomes a full one.
"""

from tailorstore.domain.strategies.budget import Budget
from tailorstore.domain.strategies.checks import IMPORTANCE, parse_bytes
from tailorstore.domain.strategies.composing import Anchor, Intersection, LightRest, MaxAge, StrategyBase, Union
from tailorstore.domain.strategies.measured import Threshold, TopK
from tailorstore.domain.strategies.schedules import All, Filter, Light, Parity, RoundRobin, Staggered
from tailorstore.domain.strategies.text import STRATEGIES, config_of, parse_strategy, signature_of, strategy_from_config

__all__ = [
    "IMPORTANCE",
    "STRATEGIES",
    "All",
    "Anchor",
    "Budget",
    "Filter",
    "Intersection",
    "Light",
    "LightRest",
    "MaxAge",
    "Parity",
    "RoundRobin",
    "Staggered",
    "StrategyBase",
    "Threshold",
    "TopK",
    "Union",
    "config_of",
    "parse_bytes",
    "parse_strategy",
    "signature_of",
    "strategy_from_config",
]
