"""What a composite holds: documents, and the arrays, slots and states that they describe. Nothing above knows how."""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tailorstore.domain.chunks import Box
from tailorstore.domain.errors import ClosedError, CorruptDocumentError, LayerNotFoundError
from tailorstore.domain.records import EXTRA_LAYER, Composite, LayerDocument
from tailorstore.domain.skeleton import paths_in
from tailorstore.engine.light.decode import read_tensor, read_tensors
from tailorstore.engine.light.proof import check_held, size_of
from tailorstore.engine.light.sources import Source, source_of
from tailorstore.engine.read import load_documents
from tailorstore.engine.tensors.lazy import LazyTensor
from tailorstore.engine.tensors.memory import DTYPES, Tensor, as_bytes, empty_host, scalar_from_hex
from tailorstore.engine.tensors.packing import unpack
from tailorstore.engine.tensors.restore import StoredOptim, StoredTensor
from tailorstore.storage.transport import Objects

OF_RANKS = "ranks"
"""Key in the skeleton of ``@extra``: a list with, by rank, ``extra`` and ``rng`` if they are not the coordinator's."""


class CompositeContents:
    """The contents of one composite, read when they are asked for. Safe to share between threads."""

    def __init__(
        self,
        composite: Composite,
        objects: Objects,
        known: Mapping[str, LayerDocument] | None,
        *,
        known_bases: Mapping[str, LayerDocument] | None = None,
        rank: tuple[int, int] = (0, 1),
    ) -> None:
        """Take what the catalog says, the root, and documents that are in memory already.

        Args:
            composite: from the catalog.
            objects: the root.
            known: documents of layers.
            known_bases: documents of the bases of light versions.
            rank: number of this process among those that restore together, and how many these are.
        """
        self._composite = composite
        self._objects = objects
        self._known = dict(known or {})
        self._known_bases = dict(known_bases or {})
        self._rank = rank
        self._closed = False
        self._lock = threading.Lock()
        self._documents: dict[str, LayerDocument] | None = None
        self._bases: dict[str, LayerDocument] = {}
        self._owners: dict[str, str] | None = None

    def close(self) -> None:
        """Refuse further use."""
        self._closed = True

    def documents(self) -> dict[str, LayerDocument]:
        """Return the document of every layer, ``@extra`` included; read at the first call.

        Raises:
            ClosedError: the checkpoint was closed.
            MissingObjectError, CorruptDocumentError: a document is gone or not what was written.
        """
        if self._closed:
            msg = f"the checkpoint of step {self._composite.commit.step} was closed; check it out again"
            raise ClosedError(msg)
        with self._lock:
            if self._documents is None:
                self._bases = load_documents(self._objects, self._composite.bases.values(), self._known_bases)
                found = load_documents(self._objects, self._composite.versions.values(), self._known)
                self._check_names(found)
                self._documents = found
            return self._documents

    def _check_names(self, documents: Mapping[str, LayerDocument]) -> None:
        """Make sure that each tensor has one layer, and that tied names are tied to tensors that there are."""
        contents = [document.content for layer, document in documents.items() if layer != EXTRA_LAYER]
        for sections in (("params", "buffers", "aliases"), ("states",), ("optim",)):
            names = Counter(name for content in contents for section in sections for name in content[section])
            name, times = max(names.items(), key=lambda item: item[1], default=("", 1))
            if times > 1:
                self._refuse(f"{name!r} is in {times} layers")
        tensors = {name for content in contents for section in ("params", "buffers") for name in content[section]}
        loose = {target for content in contents for target in content["aliases"].values()} - tensors
        if loose:
            self._refuse(f"{min(loose)!r}, which other names are tied to, is in no layer")

    def _refuse(self, why: str) -> NoReturn:
        commit = self._composite.commit
        msg = (
            f"the composite of step {commit.step} on {commit.branch!r} contradicts itself: {why}; run 'tailorstore"
            " verify', and restore another step"
        )
        raise CorruptDocumentError(msg)

    def array(self, layer: str, path: str) -> Source:
        """Return where one tensor of a layer is."""
        document = self.documents()[layer]
        base = (self._composite.bases[layer], self._bases[layer]) if layer in self._bases else None
        return source_of(self._composite.versions[layer], document, path, base)

    def model_arrays(self) -> tuple[dict[str, Source], dict[str, str]]:
        """Return tensor name → where it is, and tied name → the name it is stored under."""
        arrays: dict[str, Source] = {}
        aliases: dict[str, str] = {}
        for layer, document in self.layer_documents():
            for kind in ("params", "buffers"):
                arrays |= {name: self.array(layer, value["$array"]) for name, value in document.content[kind].items()}
            aliases |= document.content["aliases"]
        return arrays, aliases

    def layer_documents(self) -> list[tuple[str, LayerDocument]]:
        """Return the documents of all layers but ``@extra``."""
        return [(layer, document) for layer, document in self.documents().items() if layer != EXTRA_LAYER]

    def states(self) -> dict[str, Any]:
        """Return what modules gave as extra state, packed, by name."""
        return {
            name: value for _, document in self.layer_documents() for name, value in document.content["states"].items()
        }

    def slots(self) -> dict[str, Mapping[str, Any]]:
        """Return parameter name → slot → packed value."""
        return {
            name: held for _, document in self.layer_documents() for name, held in document.content["optim"].items()
        }

    def layer_of(self, name: str) -> str:
        """Return the layer that stores a tensor or its state.

        Raises:
            LayerNotFoundError: no layer does.
        """
        if self._owners is None:
            self._owners = {
                owned: layer
                for layer, document in self.layer_documents()
                for kind in ("params", "buffers", "states", "optim")
                for owned in document.content[kind]
            }
        if name in self._owners:
            return self._owners[name]
        msg = f"the composite of step {self._composite.commit.step} has no tensor {name!r}"
        raise LayerNotFoundError(msg)

    def stored_optim(self, documents: Mapping[str, LayerDocument], aliases: Mapping[str, str]) -> StoredOptim:
        """Return what a restore of optimizers compares with."""
        specs = {
            name: {path: stored_tensor(self.array(layer, path)) for path in paths_in(held)}
            for layer, document in documents.items()
            if layer != EXTRA_LAYER
            for name, held in document.content["optim"].items()
        }
        return StoredOptim(
            groups=self.param_groups(),
            shared=self._per_optimizer("shared", dict),
            classes=self._per_optimizer("optimizers", str),
            slots=self.slots(),
            specs=specs,
            aliases=aliases,
        )

    def extra_content(self) -> Mapping[str, Any]:
        """Return the skeleton of ``@extra``, with this rank's own parts where as many ranks committed it."""
        if EXTRA_LAYER not in self._composite.versions:
            return {}
        content = self.documents()[EXTRA_LAYER].content
        rank, size = self._rank
        return {**content, **content[OF_RANKS][rank]} if ranks_of(content) == size > 1 else content

    def extras(self) -> list[Any]:
        """Return what the caller of each rank that committed passed as extra, by rank."""
        content = self.documents()[EXTRA_LAYER].content if EXTRA_LAYER in self._composite.versions else {}
        own = content.get(OF_RANKS)
        parts = own if isinstance(own, list) else [{}]
        return [unpack(part.get("extra", content.get("extra", {})), self.extra_loader()) for part in parts]

    def extra_part(self, part: str, default: Any) -> Any:  # noqa: ANN401
        """Return one part of ``@extra``, unpacked; ``default`` where there is none."""
        content = self.extra_content()
        return unpack(content[part], self.extra_loader()) if part in content else default

    def param_groups(self) -> list[list[dict[str, Any]]]:
        """Return per optimizer its groups: options, and ``params`` as names.

        Raises:
            CorruptDocumentError: they are something else.
        """
        found: Any = self.extra_part("param_groups", [])
        groups = [group for held in found for group in held] if _is_list_of(found, list) else [None]
        if not all(isinstance(group, dict) and _is_list_of(group.get("params"), str | int) for group in groups):
            self._refuse("its parameter groups are none")
        checked: list[list[dict[str, Any]]] = found
        return checked

    def _per_optimizer(self, part: str, kind: type) -> list[Any]:
        """Return a part of ``@extra`` that has one entry an optimizer, each of a kind or ``None``."""
        found: Any = self.extra_part(part, [])
        if not _is_list_of(found, kind | None) or len(found) not in (0, len(self.param_groups())):
            self._refuse(f"its {part} are not those of its optimizers")
        entries: list[Any] = found
        return entries

    def read(self, source: Source) -> Tensor:
        """Read one tensor into new host memory."""
        return read_tensor(self._objects, source)

    def extra_loader(self) -> Callable[[str], Tensor]:
        """Return what reads an array of ``@extra``."""
        return lambda path: read_tensor(self._objects, self.array(EXTRA_LAYER, path))

    def loader(self, name: str) -> Callable[[str], Tensor]:
        """Return what reads an array of the layer that stores a tensor."""
        return lambda path: read_tensor(self._objects, self.array(self.layer_of(name), path))

    def read_many(self, arrays: Mapping[Any, Source]) -> dict[Any, Tensor]:
        """Read whole tensors into new host memory, in parallel."""
        check_held(self._objects, arrays.values(), sum(map(size_of, arrays.values())))
        targets = {key: empty_host(array.shape, array.dtype) for key, array in arrays.items()}
        read_tensors(self._objects, [(array, targets[key]) for key, array in arrays.items()])
        return targets

    def weights(self, layer: str) -> dict[str, Tensor]:
        """Read a layer's parameters, or the buffers of one without any, into new host memory, by name."""
        content = self.documents()[layer].content
        held = content["params"] or content["buffers"]
        return self.read_many({name: self.array(layer, value["$array"]) for name, value in held.items()})

    def elements(self, layer: str, path: str, box: Box) -> memoryview:
        """Read part of a tensor as bytes in C order."""
        return as_bytes(read_tensor(self._objects, self.array(layer, path), box).contiguous())

    def part(self, layer: str, path: str, box: Box) -> Tensor:
        """Read part of a tensor into new host memory."""
        return read_tensor(self._objects, self.array(layer, path), box)

    def _lazy(self, array: Source) -> LazyTensor:
        objects = self._objects
        return LazyTensor(
            array.shape,
            DTYPES[array.dtype],
            array.version.layer,
            array.version.step,
            lambda box: read_tensor(objects, array, box),
        )

    def model_entries(self) -> Mapping[str, LazyTensor]:
        """Return tensor name → lazy tensor, tied names included."""
        arrays, aliases = self.model_arrays()
        found = {name: self._lazy(array) for name, array in arrays.items()}
        return found | {name: found[target] for name, target in aliases.items()}

    def optim_entries(self) -> Mapping[str, Mapping[str, Any]]:
        """Return parameter name → slot → lazy tensor or plain value."""
        return {
            name: {slot: self._lazy_slot(layer, value) for slot, value in held.items()}
            for layer, document in self.layer_documents()
            for name, held in document.content["optim"].items()
        }

    def _lazy_slot(self, layer: str, value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict) and value.keys() == {"$scalar"}:
            scalar = scalar_from_hex(*value["$scalar"])
            return LazyTensor((), scalar.dtype, layer, self._composite.versions[layer].step, lambda _: scalar.clone())
        return unpack(value, lambda path: self._lazy(self.array(layer, path)))


def _is_list_of(value: object, kind: Any) -> bool:  # noqa: ANN401 - a type, or a union of types
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def ranks_of(content: Mapping[str, Any]) -> int:
    """Return how many ranks made the commit of which this is the skeleton of ``@extra``."""
    parts = content.get(OF_RANKS)
    return len(parts) if isinstance(parts, list) else 1


def stored_tensor(array: Source) -> StoredTensor:
    """Return what a comparison needs to know of a stored tensor."""
    return StoredTensor(array.shape, array.dtype, array.digests)
