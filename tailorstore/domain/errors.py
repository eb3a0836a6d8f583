"""The error tree, grouped by what a handler would do.

```
TailorError
├─ NotFoundError (KeyError)        StoreNotFound · BucketNotFound · RefNotFound · LayerNotFound · BranchNotFound
├─ AlreadyExistsError              TagExists · BranchExists
├─ InvalidInputError (ValueError)  BadName · Mask · StepOrder · ModelMismatch · ExtraState · AmbiguousRef ·
│                                 RestoreMismatch · BoundsExceeded · RanksDisagree
├─ ConflictError                   HeadMoved · LeaseExpired · RootTaken · CatalogOutdated → look again, then decide
├─ UnavailableError                StorageUnavailable · StorageFull · CatalogUnavailable · RankLost → back off, retry
├─ AccessDeniedError (PermissionError)  credentials that storage or catalog refused
├─ IntegrityError                  DigestMismatch · MissingObject · CorruptDocument · NotAStore ·
│                                 CatalogDamaged                                 → stop, run verify
├─ VersionError                    SchemaOutdated · SchemaTooNew · FormatTooNew   → upgrade
├─ ClosedError (RuntimeError)      a closed store was used
└─ MissingDependencyError (ImportError)  names the package to install
```

Errors of SQLAlchemy, fsspec, obstore and Zarr never leave their floor: they arrive as one of these, chained.
Every message says what was tried, on which branch, step, layer or key, and what to do next.
"""


class TailorError(Exception):
    """Base of every error that tailorstore raises on purpose."""

    def __str__(self) -> str:
        """Return the message unquoted (``KeyError`` would quote it)."""
        return str(self.args[0]) if self.args else self.__class__.__name__


class NotFoundError(TailorError, KeyError):
    """Something that was named does not exist."""


class StoreNotFoundError(NotFoundError):
    """The root holds no ``tailorstore.json`` and creating one was not asked for."""


class BucketNotFoundError(NotFoundError):
    """The bucket or container of the root does not exist; tailorstore never creates buckets."""


class RefNotFoundError(NotFoundError):
    """A ref names no commit."""


class BranchNotFoundError(RefNotFoundError):
    """No branch of that name, or one without commits."""


class LayerNotFoundError(NotFoundError):
    """A composite has no layer or tensor of that name."""


class AlreadyExistsError(TailorError):
    """Something of that name is there already, and names are never taken over silently."""


class TagExistsError(AlreadyExistsError):
    """The tag exists; tags are fixed names."""


class BranchExistsError(AlreadyExistsError):
    """The branch exists; pass ``move=True`` to move it."""


class InvalidInputError(TailorError, ValueError):
    """The caller's input cannot be used; nothing was written."""


class BadNameError(InvalidInputError):
    """A branch or tag name that could be mistaken for another kind of ref."""


class MaskError(InvalidInputError):
    """A mask names an unknown layer or asks for something that a layer cannot be."""


class StepOrderError(InvalidInputError):
    """The step is not after the head of the branch."""


class ModelMismatchError(InvalidInputError):
    """The model's layers, tensors or shapes differ from those of the branch's newest commit."""


class ExtraStateError(InvalidInputError):
    """Extra state holds something that neither JSON nor a tensor can express; the message has its path."""


class AmbiguousRefError(InvalidInputError):
    """A ref could mean more than one commit."""


class RestoreMismatchError(InvalidInputError):
    """A composite does not fit the model or optimizer; lists every difference. Nothing was changed."""


class BoundsExceededError(InvalidInputError):
    """A composite's layers are further from what the model was than the caller allows. Nothing was changed."""


class RanksDisagreeError(InvalidInputError):
    """The ranks of a collective call were not given the same; raised on all of them. Nothing was written."""


class ConflictError(TailorError):
    """Somebody else was faster; look at the store again and decide."""


class HeadMovedError(ConflictError):
    """Another process published on the branch first. Nothing of this commit is visible."""


class LeaseExpiredError(ConflictError):
    """The commit took longer than its lease and GC voided it. Nothing of it is visible."""


class RootTakenError(ConflictError):
    """Another catalog owns the root; this one may read but not write."""


class CatalogOutdatedError(ConflictError):
    """The catalog is older than its root, as one restored from a backup is; rebuild it. Nothing was changed."""


class UnavailableError(TailorError):
    """A server or disk did not do its work; the same call may succeed later."""


class StorageUnavailableError(UnavailableError):
    """Object storage cannot be reached or answered with a server error."""


class StorageFullError(UnavailableError):
    """No space is left at the root, or a quota is reached. Unpublished objects are swept by GC."""


class CatalogUnavailableError(UnavailableError):
    """The catalog's database cannot be reached, opened or written."""


class RankLostError(UnavailableError):
    """Another rank did not answer in time or has died; raised on all that are left. Nothing was published."""


class AccessDeniedError(TailorError, PermissionError):
    """Storage or catalog refused the credentials."""


class IntegrityError(TailorError):
    """Stored data is not what was written. Stop and run ``tailorstore verify``."""


class DigestMismatchError(IntegrityError):
    """An object's content does not match its recorded digest."""


class MissingObjectError(IntegrityError):
    """An object that a published commit refers to is gone or short."""


class CorruptDocumentError(IntegrityError):
    """A metadata document is not valid, or not the one that the catalog recorded."""


class NotAStoreError(IntegrityError):
    """The root holds a ``tailorstore.json`` that is not a tailorstore document."""


class CatalogDamagedError(IntegrityError):
    """The catalog's database is not what was written to it, or gone: restore it, or rebuild it from the root."""


class VersionError(TailorError):
    """Written by another version of tailorstore."""


class SchemaOutdatedError(VersionError):
    """The catalog's schema is older than this version: run ``tailorstore upgrade``."""


class SchemaTooNewError(VersionError):
    """The catalog's schema is newer than this version of tailorstore knows."""


class FormatTooNewError(VersionError):
    """The root's format is newer than this version of tailorstore knows."""


class ClosedError(TailorError, RuntimeError):
    """The store was closed before this call."""


class MissingDependencyError(TailorError, ImportError):
    """An optional package is not installed; the message says which."""
