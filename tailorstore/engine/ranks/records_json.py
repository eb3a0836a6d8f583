"""Records as JSON data, to be sent from rank to rank."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from tailorstore.domain.records import Commit, Composite, LayerDocument, LayerMeasures, LayerVersion
from tailorstore.engine.publish import Head
from tailorstore.storage.layers import SealedLayer, document_from_json, document_to_json


def commit_to_json(commit: Commit) -> dict[str, Any]:
    """Return a commit as JSON data; metrics may be NaN, for which JSON has no word."""
    metrics = {name: float(value).hex() for name, value in commit.metrics.items()}
    return {**asdict(commit), "created_at": commit.created_at.isoformat(), "metrics": metrics}


def commit_from_json(described: Mapping[str, Any]) -> Commit:
    """Return the commit that :func:`commit_to_json` wrote."""
    changed = {
        "created_at": datetime.fromisoformat(described["created_at"]),
        "metrics": {name: float.fromhex(value) for name, value in described["metrics"].items()},
        "layers_written": tuple(described["layers_written"]),
    }
    return Commit(**{**described, **changed})


def sealed_to_json(sealed: SealedLayer) -> dict[str, Any]:
    """Return a sealed layer as JSON data, without the sizes of its objects."""
    return {
        "version": asdict(sealed.version),
        "document": document_to_json(sealed.document, sealed.version.digest),
    }


def sealed_from_json(described: Mapping[str, Any]) -> SealedLayer:
    """Return the sealed layer that :func:`sealed_to_json` wrote."""
    return SealedLayer(LayerVersion(**described["version"]), document_from_json(described["document"]), {})


def composite_to_json(composite: Composite) -> dict[str, Any]:
    """Return a composite as JSON data."""
    return {
        "commit": commit_to_json(composite.commit),
        "versions": {name: asdict(version) for name, version in composite.versions.items()},
        "bases": {name: asdict(version) for name, version in composite.bases.items()},
    }


def composite_from_json(described: Mapping[str, Any]) -> Composite:
    """Return the composite that :func:`composite_to_json` wrote."""
    return Composite(
        commit_from_json(described["commit"]),
        {name: LayerVersion(**version) for name, version in sorted(described["versions"].items())},
        {name: LayerVersion(**version) for name, version in sorted(described["bases"].items())},
    )


def head_to_json(head: Head) -> dict[str, Any]:
    """Return a composite with its documents as JSON data."""
    versions, bases = head.composite.versions, head.composite.bases
    return {
        "composite": composite_to_json(head.composite),
        "documents": {
            name: document_to_json(document, versions[name].digest) for name, document in head.documents.items()
        },
        "base_documents": {
            name: document_to_json(document, bases[name].digest) for name, document in head.base_documents.items()
        },
    }


def head_from_json(described: Mapping[str, Any]) -> Head:
    """Return the head that :func:`head_to_json` wrote."""
    return Head(
        composite_from_json(described["composite"]),
        _documents(described["documents"]),
        _documents(described["base_documents"]),
    )


def _documents(described: Mapping[str, Any]) -> dict[str, LayerDocument]:
    return {name: document_from_json(document) for name, document in sorted(described.items())}


def measures_to_json(measures: Mapping[str, LayerMeasures]) -> dict[str, Any]:
    """Return measures by layer as JSON data, to the bit."""
    return {name: {key: _hex(value) for key, value in asdict(found).items()} for name, found in measures.items()}


def measures_from_json(described: Mapping[str, Any]) -> dict[str, LayerMeasures]:
    """Return the measures that :func:`measures_to_json` wrote."""
    return {
        name: LayerMeasures(**{key: _number(value) for key, value in found.items()})
        for name, found in described.items()
    }


def _number(value: Any) -> Any:  # noqa: ANN401 - a field of LayerMeasures
    return float.fromhex(value) if isinstance(value, str) else value


def _hex(value: float | bool | None) -> str | bool | None:
    return value.hex() if isinstance(value, float) else value
