"""Every way to bytes: each transport over each place that it speaks."""

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tailorstore.storage.objects import Objects, open_objects

if TYPE_CHECKING:
    from tests.conftest import Root


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """An empty root and the transport that reaches it."""

    url: str
    transport: str | None
    storage_options: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def open(self) -> Objects:
        return open_objects(self.url, self.storage_options, self.transport)


S3 = pytest.mark.s3
PLACES = [
    pytest.param(("file", None), id="file"),
    pytest.param(("file", "obstore"), id="file-obstore"),
    pytest.param(("file", "fsspec"), id="file-fsspec"),
    pytest.param(("memory", None), id="memory"),
    pytest.param(("s3", None), id="s3-obstore", marks=S3),
    pytest.param(("s3", "fsspec"), id="s3-fsspec", marks=S3),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Give an empty root for each way."""
    kind, transport = request.param
    if kind == "file":
        return Place(f"file://{tmp_path}/a root", transport)
    if kind == "memory":
        return Place(f"memory://{uuid.uuid4().hex}/run", transport)
    root: Root = request.getfixturevalue("s3_root")
    return Place(root.url, transport, root.storage_options)


@pytest.fixture
def objects(place: Place) -> Iterator[Objects]:
    """Give the open transport of each way."""
    opened = place.open()
    yield opened
    opened.close()
