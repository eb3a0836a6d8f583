"""Names: parameter name → layer, layer version → key, text → ref. Pure functions."""

import hashlib
import operator
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from tailorstore.domain.errors import BadNameError, InvalidInputError
from tailorstore.domain.records import EXTRA_LAYER, Commit

ROOT_DOCUMENT = "tailorstore.json"
LAYERS_PREFIX = "layers/"
COMMITS_PREFIX = "commits/"
REFS_PREFIX = "refs/"
QUARANTINE_PREFIX = "quarantine/"
DEFAULT_BRANCH = "main"
LATEST = "latest"

LayerRule = Callable[[str], str]
"""Maps a tensor's full name to the name of its layer."""

_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.")
_MAX_COMPONENT = 160
"""Longest escaped name that is used as it is: well below the 255 bytes that file systems allow."""


def layer_rule(depth: int = 1) -> LayerRule:
    """Return the rule that cuts a name after its ``depth``-th integer part.

    A name with fewer integers is cut after its last one; a name with none belongs to the module that holds it;
    a tensor that no module holds is a layer of its own.

    Examples:
        >>> rule = layer_rule()
        >>> rule("transformer.h.0.attn.c_attn.weight"), rule("lm_head.weight"), rule("cls_token")
        ('transformer.h.0', 'lm_head', 'cls_token')
        >>> layer_rule(2)("layers.3.mlp.experts.7.w1.weight"), layer_rule(2)("layers.3.norm.weight")
        ('layers.3.mlp.experts.7', 'layers.3')
    """
    if depth < 1:
        msg = f"layer depth must be at least 1, not {depth}"
        raise InvalidInputError(msg)

    def rule(name: str) -> str:
        parts = name.split(".")
        # The last part names the tensor; only in a flat list (`0`, `1`, …) is it all there is.
        integers = [index for index, part in enumerate(parts) if part.isdecimal() and part.isascii()]
        if integers:
            return ".".join(parts[: integers[min(depth, len(integers)) - 1] + 1])
        return ".".join(parts[:-1]) or name

    return rule


def escape(name: str) -> str:
    """Turn any name into one path component of plain ASCII; different names stay different.

    Quoted-printable style (``=2F`` for a slash), because ``%`` and ``~`` are rewritten by some object-store clients.
    Names that would pass for something else (``.``, ``..``, Zarr's ``__…`` and ``zarr.json``, our own ``@…``) are
    escaped too.
    A name that gets too long for file systems is cut and ends in a hash; the full name stands in the document.

    Examples:
        >>> escape("transformer.h.0"), escape("../etc"), escape("a b"), escape("@extra"), escape("")
        ('transformer.h.0', '=2E.=2Fetc', 'a=20b', '=40extra', '=')
    """
    escaped = "".join(
        char if char in _PLAIN else "".join(f"={byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
        for char in name
    )
    if escaped.startswith((".", "__")) or escaped == "zarr.json":
        escaped = f"={ord(escaped[0]):02X}{escaped[1:]}"
    if len(escaped) > _MAX_COMPONENT:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return f"{escaped[: _MAX_COMPONENT - 40]}=={digest}"
    return escaped or "="


def layer_component(layer: str) -> str:
    """Return the path component of a layer; only the pseudo-layer ``@extra`` keeps its ``@``."""
    return layer if layer == EXTRA_LAYER else escape(layer)


def version_prefix(layer: str, version_id: str) -> str:
    """Return the key prefix, ending in ``/``, under which all objects of one layer version lie."""
    return f"{LAYERS_PREFIX}{layer_component(layer)}/{version_id}/"


def manifest_key(commit_id: str) -> str:
    """Return the key of a commit's manifest."""
    return f"{COMMITS_PREFIX}{commit_id}.json"


def ref_record_key(record_id: str) -> str:
    """Return the key of a tag's or branch's record."""
    return f"{REFS_PREFIX}{record_id}.json"


def quarantine_key(component: str, version_id: str) -> str:
    """Return the key of the record that a layer version is damaged; ``component`` is that of the layer."""
    return f"{QUARANTINE_PREFIX}{component}/{version_id}.json"


_IDS_SINCE = datetime(2020, 1, 1, tzinfo=UTC).timestamp()
_FIRST_STAMP, _LAST_STAMP = 0xA0000000, 0xFFFFFFFF
"""Of the years 2020 to 2071. The first hex digit is a letter, so that no id reads as a step."""


def new_id() -> str:
    """Return a fresh id of 20 hex digits: the second, by this machine's clock, and 48 random bits. Ids sort by time."""
    return _stamp(time.time()) + secrets.token_hex(6)


def least_id(moment: datetime) -> str:
    """Return the least id that could be made at a moment: what sorts before it is older."""
    return _stamp(moment.timestamp()) + "0" * 12


def _stamp(seconds: float) -> str:
    # A clock that is wrong by decades still makes ids; they only sort first or last.
    return f"{min(max(_FIRST_STAMP + int(seconds - _IDS_SINCE), _FIRST_STAMP), _LAST_STAMP):08x}"


_ID = re.compile(r"[0-9a-f]{20}")
_ID_PREFIX = re.compile(r"[0-9a-f]{4,20}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,199}")


def is_id(text: str) -> bool:
    """Tell whether a text has the form of a commit id."""
    return _ID.fullmatch(text) is not None


def check_name(kind: Literal["branch", "tag"], name: str) -> str:
    """Return a branch's or tag's name if it can be one.

    Raises:
        BadNameError: it could be mistaken for a step, a commit or ``latest``, or has characters that refs cannot have.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        msg = f"{name!r} cannot name a {kind}: use 1 to 200 letters, digits and . _ / + -, with no sign first"
        raise BadNameError(msg)
    if name == LATEST or name.isdecimal():
        msg = f"{name!r} cannot name a {kind}: it already means {'the newest commit' if name == LATEST else 'a step'}"
        raise BadNameError(msg)
    return name


@dataclass(frozen=True, slots=True)
class Ref:
    """What a person typed to mean a commit."""

    text: str
    kind: Literal["latest", "step", "branch@step", "name"]
    """``name``: a tag, a branch, a commit id or the beginning of one."""
    name: str | None = None
    step: int | None = None

    @property
    def may_be_id(self) -> bool:
        """Whether the text could be a commit id or the beginning of one."""
        return _ID_PREFIX.fullmatch(self.text) is not None


def parse_ref(ref: str | int | Commit) -> Ref:
    """Parse ``1200``, ``latest``, ``main``, ``main@1200``, a tag, a commit id or its beginning.

    Raises:
        InvalidInputError: the text can be none of these.

    Examples:
        >>> parse_ref("main@1200").kind, parse_ref(7).step, parse_ref("latest").kind
        ('branch@step', 7, 'latest')
    """
    if isinstance(ref, Commit):
        ref = ref.id
    elif hasattr(ref, "__index__") and not isinstance(ref, bool):
        ref = str(operator.index(ref))  # also numbers of NumPy and torch
    if not isinstance(ref, str) or not ref:
        msg = f"{ref!r} is no ref: give a step, 'latest', a branch, branch@step, a tag or a commit id"
        raise InvalidInputError(msg)
    if ref == LATEST:
        return Ref(ref, "latest")
    if ref.isascii() and ref.isdecimal():
        return Ref(ref, "step", step=int(ref))
    if "@" in ref:
        name, _, step = ref.rpartition("@")
        if not (step.isascii() and step.isdecimal()) or not _NAME.fullmatch(name):
            msg = f"{ref!r} is no ref: after the @ comes a step, as in main@1200"
            raise InvalidInputError(msg)
        return Ref(ref, "branch@step", name=name, step=int(step))
    if not _NAME.fullmatch(ref):
        msg = f"{ref!r} is no ref: give a step, 'latest', a branch, branch@step, a tag or a commit id"
        raise InvalidInputError(msg)
    return Ref(ref, "name", name=ref)


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names as people count: ``blocks.2`` before ``blocks.10``.

    Examples:
        >>> sorted(["blocks.10", "blocks.2", "@extra"], key=natural)
        ['@extra', 'blocks.2', 'blocks.10']
    """
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), "") if at % 2 else (-1, part) for at, part in enumerate(parts)]
