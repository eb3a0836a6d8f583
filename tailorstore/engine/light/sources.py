"""Where the elements of a stored tensor are: in an array of its own, or coded in a light version on its base."""

from dataclasses import dataclass
from typing import TypeAlias

from tailorstore.domain.errors import CorruptDocumentError
from tailorstore.domain.light import BASED, LightTensor
from tailorstore.domain.records import LayerDocument, LayerVersion
from tailorstore.engine.read import StoredArray
from tailorstore.storage.light import CODES, EXACT, SCALES


@dataclass(frozen=True, slots=True)
class LightSource:
    """One tensor of a light version: all that reading it needs."""

    version: LayerVersion
    document: LayerDocument
    path: str
    base: StoredArray | None
    """Its elements in the base; ``None`` where they are not needed."""
    master: "LightSource | None" = None
    """What it is the rounding of, if it is one."""

    @property
    def tensor(self) -> LightTensor:
        """Its entry in the version's table."""
        assert self.document.light is not None  # noqa: S101 (made of light documents only)
        return self.document.light.tensors[self.path]

    @property
    def block(self) -> int:
        """Elements that share a scale."""
        assert self.document.light is not None  # noqa: S101
        return self.document.light.block

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        """Name of its dtype."""
        return self.tensor.dtype

    @property
    def digests(self) -> tuple[str, ...]:
        """What tells it from tensors that are not the same one."""
        return (f"{self.version.version_id}/{self.path}",)

    @property
    def arrays(self) -> dict[str, StoredArray]:
        """The version's arrays of codes, scales and exact bytes, as far as it has them."""
        held = self.document.arrays
        return {path: StoredArray(self.version, held[path]) for path in (CODES, SCALES, EXACT) if path in held}


Source: TypeAlias = StoredArray | LightSource


def source_of(
    version: LayerVersion,
    document: LayerDocument,
    path: str,
    base: tuple[LayerVersion, LayerDocument] | None,
) -> Source:
    """Return where a tensor of a layer is.

    Args:
        version: of the layer.
        document: its document.
        path: of the tensor's array.
        base: version and document of what a light version is a difference to.

    Raises:
        KeyError: the layer has no such tensor.
        CorruptDocumentError: the base does not have what the light version is a difference to.
    """
    if document.light is None:
        return StoredArray(version, document.arrays[path])
    tensor = document.light.tensors[path]
    if tensor.of is not None:
        master = source_of(version, document, tensor.of, base)
        assert isinstance(master, LightSource)  # noqa: S101 (of the same document)
        return LightSource(version, document, path, None, master)
    if tensor.coding not in BASED:
        return LightSource(version, document, path, None)
    record = base[1].arrays.get(path) if base is not None else None
    if base is None or record is None or (record.spec.shape, record.spec.dtype) != (tensor.shape, tensor.dtype):
        msg = (
            f"layer {version.layer!r} of step {version.step}: tensor {path!r} is a difference to version"
            f" {version.base_id}, which has no such tensor; run 'tailorstore verify', or take an older step that is"
            " whole by checkout(…, fallback=True), 'tailorstore checkout --fallback'"
        )
        raise CorruptDocumentError(msg)
    return LightSource(version, document, path, StoredArray(base[0], record))
