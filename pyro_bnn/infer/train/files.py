# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: written beside their place, moved there in one step, checked when read."""

import errno
import glob
import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any, Self

import torch

try:
    import fcntl
except ImportError:  # no locks: what killed writers leave behind stays
    fcntl: Any = None  # type: ignore[no-redef]

#: What follows the archive of torch in a file, before the digest of the archive.
MARK = b"pyro_bnn sha256\n"
#: The version of checkpoints and saved guides that is written; files since version 2 end in a digest.
FORMAT = 2

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class Replacement:
    """
    A new version of a file (or of a folder such as a Zarr store) that takes the place of the old one when it is whole.

    The new version is made at :attr:`path`, in a hidden folder beside the old one. It gets the permissions of the
    file that it replaces, or those that the umask leaves to a new one; behind a symbolic link its target is replaced.
    The hidden folder is locked while its writer lives; those of killed writers are removed by the next one.

    :param path: the file; its folder is created.

    Example::

        >>> folder = tempfile.mkdtemp()
        >>> with Replacement(f"{folder}/text") as new:
        ...     _ = new.path.write_text("whole")
        >>> os.listdir(folder)
        ['text']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = Path(os.path.realpath(path))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(self.target)
        self._folder = tempfile.TemporaryDirectory(
            prefix=_prefix(self.target), suffix=".tmp", dir=self.target.parent, ignore_cleanup_errors=True
        )
        self._lock = _lock(self._folder.name)
        self.path = Path(self._folder.name) / self.target.name

    def commit(self) -> None:
        """Moves the new version into place."""
        if self.path.is_dir():
            if self.target.exists():  # a folder cannot be replaced in one step
                before = _before(Path(self._folder.name))
                before.mkdir()
                self.target.rename(before / self.target.name)
        else:
            if self.target.exists():
                self.path.chmod(stat.S_IMODE(self.target.stat().st_mode))
            _sync(self.path)
        os.replace(self.path, self.target)
        _sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Removes what has been written; the old version stays."""
        self._folder.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        try:
            if error is None:
                self.commit()
                return
        except OSError as found:
            error = found
        self.discard()
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}; what was there before is unchanged",
                str(self.target),
            ) from error
        if kind is None:
            raise error


def remove_left_overs(target: Path) -> None:
    """Removes the hidden folders that killed writers of a file have left."""
    for name in glob.glob(f"{glob.escape(str(target.parent / _prefix(target)))}*.tmp"):
        lock = _lock(name)
        if lock is None:
            continue  # its writer lives, or nobody can tell
        before = _before(Path(name)) / target.name
        if before.exists() and not target.exists():  # killed between the two moves of a folder
            before.rename(target)
        shutil.rmtree(name, ignore_errors=True)
        os.close(lock)


def reserve(path: Path, size: int) -> None:
    """
    Takes room on the disk for a file that may grow by ``size`` bytes, before a library writes that does not survive a full
    one; what is not used is given back when the library cuts the file to its size.

    :raises OSError: if there is less.
    """
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size + size)
    except (AttributeError, OSError) as error:  # not on every system
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None


class _Hashing:
    """A file that computes the digest of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.sha.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error  # torch may raise another in its place
            raise

    def flush(self) -> None:
        self.file.flush()


def atomic_save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """
    Writes tensors, numbers and strings, with a digest at the end, completely or not at all; the folder is created.

    :raises OSError: if it cannot be written; a file that was there before is unchanged.
    """
    with Replacement(path) as new, new.path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save({"format": FORMAT, **state}, hashing)  # type: ignore[arg-type]
        except RuntimeError:
            if hashing.error is not None:
                raise hashing.error from None
            raise
        file.write(MARK + hashing.sha.digest())


def checked_load(path: str | os.PathLike[str], kind: str, keys: set[str]) -> dict[str, Any]:
    """
    Reads what :func:`atomic_save` wrote, with certain keys, tensors on the CPU; no code in the file is run.

    :raises ValueError: naming the file, if it is damaged, of a later version, or something else.
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        sealed = _is_sealed(file, path)
        try:
            if not sealed and zipfile.ZipFile(file).testzip() is not None:  # all that older files have
                raise ValueError
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # torch raises many kinds, with advice to run the code in the file
            state = None
    version = state.get("format") if isinstance(state, dict) else None
    if state is None or (not sealed and version != 1):
        raise ValueError(
            f"{path} cannot be read: it is damaged, cut short or no file of this package. "
            "Restore it from a copy, or delete it."
        )
    if isinstance(version, int) and version > FORMAT:
        raise ValueError(
            f"{path} was written by a later version of pyro_bnn (format {version}; this one reads up to "
            f"{FORMAT}). Update pyro_bnn."
        )
    if not isinstance(version, int) or version < 1 or not keys <= state.keys():
        raise ValueError(f"{path} is no {kind} of pyro_bnn.")
    return state


def _is_sealed(file: IO[bytes], path: str) -> bool:
    """Checks the digest at the end of a file, if there is one, and goes back to the start."""
    left = file.seek(0, os.SEEK_END) - len(MARK) - hashlib.sha256().digest_size
    file.seek(max(left, 0))
    tail = file.read()
    file.seek(0)
    if left < 0 or not tail.startswith(MARK):
        return False
    sha = hashlib.sha256()
    while left and (data := file.read(min(left, 2**20))):
        sha.update(data)
        left -= len(data)
    if sha.digest() != tail[len(MARK) :]:
        raise ValueError(
            f"{path} is damaged: its contents do not have the digest that was written with them. Restore it from "
            "a copy, or delete it."
        )
    file.seek(0)
    return True


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}."


def _before(folder: Path) -> Path:
    """Where an old folder waits while the new one takes its place."""
    return folder / "before"


def _lock(folder: str) -> int | None:
    """A descriptor that holds the lock of a folder, or ``None`` if it cannot be had."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # another writer has just removed it
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _sync(path: Path) -> None:
    if fcntl is None:  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
