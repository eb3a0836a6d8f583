"""A composite checkpoint, checked out: one catalog query, no tensor bytes until they are asked for."""

import logging
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from tailorstore.domain.condition import Bounds, CompositeWarning, LayerCondition, conditions_of, shown
from tailorstore.domain.errors import BoundsExceededError, InvalidInputError
from tailorstore.domain.names import layer_component, version_prefix
from tailorstore.domain.records import EXTRA_LAYER, Commit, Composite, Fidelity, LayerDocument, LayerMeasures
from tailorstore.domain.skeleton import paths_in
from tailorstore.engine.contents import OF_RANKS, CompositeContents, ranks_of, stored_tensor
from tailorstore.engine.export import export_safetensors, export_torch
from tailorstore.engine.gc import Progress
from tailorstore.engine.lazy_mapping import LazyMapping
from tailorstore.engine.light.decode import read_tensors
from tailorstore.engine.light.sources import Source
from tailorstore.engine.ranks.group import Ranks
from tailorstore.engine.ranks.together import names_elsewhere, together
from tailorstore.engine.tensors.capture import Model, Optim, model_tensors
from tailorstore.engine.tensors.packing import unpack
from tailorstore.engine.tensors.restore import (
    Filling,
    plan_model,
    plan_optim,
    plan_states,
    raise_mismatch,
)
from tailorstore.engine.tensors.rng import set_rng_states
from tailorstore.storage.transport import Objects

if TYPE_CHECKING:
    import zarr

    from tailorstore.engine.tensors.lazy import LazyTensor
    from tailorstore.engine.tensors.memory import Tensor
    from tailorstore.engine.tensors.shards import Sharded

logger = logging.getLogger("tailorstore")

Observed = Callable[[], tuple[Sequence[int], Mapping[str, LayerMeasures]]]


class Checkpoint:
    """The newest version of every layer as of a commit. Lazy; may be used from several threads.

    A lease keeps GC from taking what it refers to; :meth:`close`, or leaving the ``with`` block, gives it back.
    """

    def __init__(
        self,
        composite: Composite,
        objects: Objects,
        *,
        known: Mapping[str, LayerDocument] | None = None,
        release: Callable[[], None] | None = None,
        drop: Callable[[], None] | None = None,
        observed: Observed | None = None,
        known_bases: Mapping[str, LayerDocument] | None = None,
        ranks: Callable[[], Ranks | None] | None = None,
        fallback_from: Commit | None = None,
    ) -> None:
        """Made by ``Store.checkout``.

        Args:
            composite: from the catalog.
            objects: the root.
            known: documents that are in memory already.
            release: gives the lease back.
            drop: gives it back some time; for when the checkpoint is forgotten without being closed.
            observed: asks the catalog for the steps of the branch's commits, and for what this one measured.
            known_bases: documents of the bases of light versions that are in memory already.
            ranks: gives the ranks that restore together, once none of them commits; ``None``: this process alone.
            fallback_from: the commit that was asked for, if this is another one.
        """
        self.fallback_from = fallback_from
        """The commit that was asked for, where ``checkout(..., fallback=True)`` gave an older one; else ``None``."""
        self._composite = composite
        self._objects = objects
        self._ranks = ranks
        found = ranks() if ranks is not None else None
        rank = (found.rank, found.size) if found is not None else (0, 1)
        self._contents = CompositeContents(composite, objects, known, known_bases=known_bases, rank=rank)
        self._release = release
        self._observed = observed
        self._conditions: dict[str, LayerCondition] | None = None
        self._closed = False
        self._finalizer = weakref.finalize(self, drop) if drop else None
        self.model: Mapping[str, LazyTensor] = LazyMapping(self._contents.model_entries, f"model of step {self.step}")
        """Tensor name → lazy tensor: parameters, buffers and tied names."""
        self.optim: Mapping[str, Mapping[str, Any]] = LazyMapping(
            self._contents.optim_entries, f"optim of step {self.step}"
        )
        """Parameter name → slot → lazy tensor, or the plain value of a slot that is none."""

    @property
    def commit(self) -> Commit:
        """The commit that was checked out."""
        return self._composite.commit

    @property
    def contents(self) -> CompositeContents:
        """What is stored and where: for adapters of frameworks that a model and an optimizer do not describe."""
        return self._contents

    @property
    def step(self) -> int:
        """Step of the commit."""
        return self._composite.commit.step

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics of the commit."""
        return MappingProxyType(dict(self._composite.commit.metrics))

    @property
    def sources(self) -> dict[str, int]:
        """Layer → step that its values come from."""
        return self._composite.sources

    @property
    def staleness(self) -> dict[str, int]:
        """Layer → commit's step minus source step."""
        return {layer: self.step - source for layer, source in self.sources.items()}

    @property
    def fidelity(self) -> dict[str, Fidelity]:
        """Layer → ``"full"`` or ``"light"``."""
        return {layer: version.fidelity for layer, version in self._composite.versions.items()}

    @property
    def quarantined(self) -> dict[str, str]:
        """Layer → what ``verify`` found wrong with it: its values cannot all be read."""
        return self._composite.quarantined

    @property
    def conditions(self) -> dict[str, LayerCondition]:
        """Layer → staleness, age, recorded error and estimated damage; asks the catalog at the first look."""
        if self._conditions is None:
            steps, measures = self._observed() if self._observed else ([], {})
            self._conditions = conditions_of(self._composite, steps, measures)
        return dict(self._conditions)

    @property
    def extra(self) -> Any:  # noqa: ANN401
        """What the caller passed as ``extra``, read anew at each access; ``{}`` where nothing was passed.

        Raises:
            MissingObjectError, DigestMismatchError, CorruptDocumentError: an object is gone or not what was written.
        """
        return self._contents.extra_part("extra", {})

    @property
    def extras(self) -> list[Any]:
        """What each rank that committed passed as ``extra``, by rank; of a process alone, a list of one."""
        return self._contents.extras()

    def model_state_dict(self) -> dict[str, Any]:
        """Read every model tensor into host memory; ready for ``model.load_state_dict``.

        Raises:
            MissingObjectError, DigestMismatchError, CorruptDocumentError: an object is gone or not what was written.
        """
        arrays, aliases = self._contents.model_arrays()
        found: dict[str, Any] = self._contents.read_many(arrays)
        found.update({name: found[target] for name, target in aliases.items()})
        found.update(
            {name: unpack(value, self._contents.loader(name)) for name, value in self._contents.states().items()}
        )
        return found

    def optim_state_dict(self) -> dict[str, Any] | list[dict[str, Any]]:
        """Read every optimizer slot into host memory; ready for ``optimizer.load_state_dict``.

        Parameters are named rather than numbered, as ``torch.distributed.checkpoint.state_dict`` does.

        Returns:
            ``{"state": …, "param_groups": …}``; a list of them where several optimizers were committed.

        Raises:
            MissingObjectError, DigestMismatchError, CorruptDocumentError: an object is gone or not what was written.
        """
        slots = self._contents.slots()
        arrays = {
            (name, path): self._contents.array(layer, path)
            for layer, document in self._contents.documents().items()
            if layer != EXTRA_LAYER
            for name, held in document.content["optim"].items()
            for path in paths_in(held)
        }
        tensors = self._contents.read_many(arrays)
        state = {
            name: {slot: unpack(value, lambda path, name=name: tensors[name, path]) for slot, value in held.items()}  # type: ignore[misc]
            for name, held in slots.items()
        }
        groups = self._contents.param_groups()
        if not any(groups):
            return {"state": state, "param_groups": []}
        dicts = []
        for optimizer_groups in groups:
            members = {name for group in optimizer_groups for name in group["params"]}
            mine = {name: held for name, held in state.items() if name in members}
            dicts.append({"state": mine, "param_groups": optimizer_groups})
        return dicts[0] if len(dicts) == 1 else dicts

    def restore(
        self,
        model: Model,
        optim: Optim = None,
        *,
        strict: bool = True,
        rng: bool = False,
        bounds: Bounds | None = None,
    ) -> Any:  # noqa: ANN401
        """Fill a model and its optimizers in place, in parallel, and return the caller's extra state.

        Of ranks that share a model all call this; each reads what it holds of it, and an error of one is raised on all.

        Args:
            model: module or dictionary of tensors; on any devices.
            optim: optimizer, several, or a state dict; what was passed to ``commit``. ``None``: weights only.
            strict: refuse missing and unexpected names, and dtypes that differ. Shapes must always agree. Otherwise
                what fits is restored, cast where dtypes differ.
            rng: also set the states of the random number generators.
            bounds: how stale, old or inexact layers may be: refuses, or warns (``CompositeWarning``), past them.

        Raises:
            BoundsExceededError: a bound is passed; names the layers. Nothing was changed.
            RestoreMismatchError: lists every difference at once. Nothing was changed.
            MissingObjectError, DigestMismatchError, CorruptDocumentError: an object is gone or not what was written;
                the model and slots may be overwritten in part, so restore another step before training on.
        """
        ranks = self.ranks()
        with together(ranks, f"restoring step {self.step}"):
            self._check(bounds)
            tensors, states = model_tensors(model)
            elsewhere = names_elsewhere(ranks, [*tensors, *states])
            filling, pairs = self._plan(model, optim, tensors, states, elsewhere, strict=strict)
            if ranks is not None:
                ranks.gather(None)  # nothing is changed if it does not fit on one of them
            self.read_into(pairs)
            for finish in filling.finish:
                finish()
            if rng:
                self.restore_rng()
            self._tell_other_ranks(ranks)
            return self.extra

    def _tell_other_ranks(self, ranks: Ranks | None) -> None:
        """Warn where ranks had extra state of their own, and now are as many no longer."""
        content = self._contents.extra_content()
        size = ranks.size if ranks is not None else 1
        own = content.get(OF_RANKS)
        differing = isinstance(own, list) and any("extra" in part for part in own)
        if differing and ranks_of(content) != size and (ranks is None or ranks.is_coordinator):
            logger.warning(
                "step %d was committed by %d ranks, each with extra state of its own, and is restored by %d: all get"
                " rank 0's; Checkpoint.extras has all of them",
                *(self.step, ranks_of(content), size),
            )

    def ranks(self) -> Ranks | None:
        """Return the ranks that restore together, once none of them commits; ``None``: this process alone."""
        return self._ranks() if self._ranks is not None else None

    def read_into(self, pairs: Iterable[tuple[Source, "Tensor | Sharded"]]) -> None:
        """Fill tensors, or what this process holds of them, from stored ones of the same shapes, in parallel.

        Raises:
            MissingObjectError, DigestMismatchError, CorruptDocumentError: some tensors may be overwritten in part.
        """
        read_tensors(self._objects, pairs)

    def restore_rng(self) -> None:
        """Set the states of the random number generators, where the commit has them for this rank."""
        extra, ranks = self._contents.extra_content(), self.ranks()
        if "rng" not in extra:
            return
        size = ranks.size if ranks is not None else 1
        if ranks is not None and ranks_of(extra) != size and not ranks.is_coordinator:
            # One state for many ranks would give all of them the same dropout.
            logger.warning(
                "step %d was committed by %d ranks and is restored by %d: the random number generators of rank %d stay"
                " as they are",
                *(self.step, ranks_of(extra), size, ranks.rank),
            )
            return
        set_rng_states(unpack(extra["rng"], self._contents.extra_loader()))

    def _plan(
        self,
        model: Model,
        optim: Optim,
        tensors: dict[str, Any],
        states: Mapping[str, Any],
        elsewhere: Collection[str],
        *,
        strict: bool,
    ) -> tuple[Filling, list[tuple[Source, "Tensor | Sharded"]]]:
        """Match what is stored with what is to be filled; changes nothing."""
        documents = self._contents.documents()
        arrays, aliases = self._contents.model_arrays()
        stored = {name: stored_tensor(array) for name, array in arrays.items()}
        stored |= {name: stored[target] for name, target in aliases.items() if target in stored}
        problems: list[str] = []
        filling = plan_model(tensors, stored, problems, strict=strict, elsewhere=elsewhere)
        pairs: list[tuple[Source, Tensor | Sharded]] = [
            (arrays[aliases.get(name, name)], target) for name, target in filling.model.items()
        ]

        def load(name: str, path: str) -> "Tensor":
            return self._contents.loader(name)(path)

        packed = self._contents.states()
        plan_states(model, states, packed, load, problems, filling, strict=strict, elsewhere=elsewhere)
        if optim is not None:
            stored_slots = self._contents.stored_optim(documents, aliases)
            plan_optim(tensors, optim, stored_slots, problems, filling, load, strict=strict, elsewhere=elsewhere)
            pairs += [
                (self._contents.array(self._contents.layer_of(name), path), target)
                for name, path, target in filling.slots
            ]
        raise_mismatch(problems, f"the composite of step {self.step} on {self.commit.branch!r}")
        return filling, pairs

    def _check(self, bounds: Bounds | None) -> None:
        if bounds is not None and not isinstance(bounds, Bounds):
            msg = f"bounds must be Bounds(…) or None, not {bounds!r}"
            raise InvalidInputError(msg)
        passed = bounds.passed_by(self.conditions.values()) if bounds is not None else []
        if not passed or bounds is None:
            return
        what = f"the composite of step {self.step} on {self.commit.branch!r}: {shown(passed)}"
        if not bounds.warn:
            msg = f"{what}. Nothing was changed; restore another step, or allow more"
            raise BoundsExceededError(msg)
        warnings.warn(what, CompositeWarning, stacklevel=3)

    def zarr(self) -> "zarr.Group":
        """Return the whole composite as one read-only Zarr group.

        Arrays are at ``<layer>/<tensor>`` and ``<layer>/@optim/<slot>/<tensor>``; names are escaped as in the root.
        Reading a chunk that is gone or damaged raises instead of giving fill values.
        """
        from tailorstore.storage.view import ViewedLayer, composite_group  # Zarr is slow to import, and few need it

        layers = {
            layer_component(layer): ViewedLayer(
                version_prefix(layer, document.version_id),
                document,
                partial(self._contents.elements, layer) if document.light is not None else None,
            )
            for layer, document in self._contents.documents().items()
        }
        attributes = {
            "commit": self.commit.id,
            "branch": self.commit.branch,
            "step": self.step,
            "sources": self.sources,
        }
        return composite_group(self._objects, attributes, layers)

    def export(
        self,
        path: str | os.PathLike[str],
        format: Literal["safetensors", "torch"] = "safetensors",  # noqa: A002 - the word that people know
        optim: bool = False,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write the composite to one file; see :func:`export_safetensors` and :func:`export_torch`, also for errors.

        Args:
            path: of the file, which appears when it is complete.
            format: ``"safetensors"``, or ``"torch"`` for ``torch.load``, which also has optimizer and extra state.
            optim: also write optimizer state to safetensors.
            overwrite: replace a file that is there.
            progress: is told what is being done, how much is done and how much there is.
        """
        if format == "torch":
            export_torch(self, path, overwrite=overwrite, progress=progress)
        elif format == "safetensors":
            export_safetensors(self, path, optim=optim, overwrite=overwrite, progress=progress)
        else:
            msg = f"unknown format {format!r}; use 'safetensors' or 'torch'"
            raise InvalidInputError(msg)

    def close(self) -> None:
        """Give the lease back: GC may take what only this checkpoint holds. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._contents.close()
        for names in (self.model, self.optim):
            if isinstance(names, LazyMapping):
                names.forget()
        if self._finalizer is not None:
            self._finalizer.detach()
        if self._release is not None:
            self._release()

    def __enter__(self) -> "Checkpoint":
        """Return the checkpoint itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __repr__(self) -> str:
        """Name the commit."""
        stale = sum(1 for steps in self.staleness.values() if steps)
        what = f"step {self.step} on {self.commit.branch!r}, commit {self.commit.id}"
        return f"<Checkpoint {what}, {stale} of {len(self.sources)} layers older>"

    def documents(self) -> Mapping[str, LayerDocument]:
        """Return the document of every layer, ``@extra`` included; read at the first call."""
        return MappingProxyType(self._contents.documents())
