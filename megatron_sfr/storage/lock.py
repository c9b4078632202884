"""One writer at a time: an advisory lock beside or inside an output, which the system releases when its holder ends.

The lock is flock's, through filelock, so a kill releases it too. The lock file names its holder and is removed at the
end; a file left behind by a kill does not block anyone.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout, UnixFileLock

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}
_POLL_S = 0.1


def lock_file(output: Path, *, inside: bool = False) -> Path:
    """Path of an output's lock: `.NAME.lock` beside it, or `.lock` in a folder that is written in place."""
    path = Path(os.path.realpath(output))  # one lock, whichever links lead to the output
    return path / ".lock" if inside else path.with_name(f".{path.name}.lock")


@contextmanager
def hold(output: Path, *, inside: bool = False, wait: float = 0.0) -> Iterator[None]:
    """Holds the lock of an output while the block runs.

    Args:
        output: the file or folder to write; the folder of its lock file is created if it is missing.
        inside: whether the output is a folder that is written in place; its parent may be read-only.
        wait: seconds to wait for a holder that may be about to end.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    path = lock_file(output, inside=inside)
    try:
        is_new = inside and not output.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not inside:
            raise
        raise ValueError(f"{output} cannot be a folder to write ({error.strerror}); choose another one") from error
    lock = UnixFileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed holder
    try:
        lock.acquire(timeout=wait, poll_interval=_POLL_S)
    except Timeout as error:
        raise ValueError(f"{output} is being written by {_holder(path)}; wait for it, or stop it") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        said = "warning: the file system of %s has no locks (%s): do not start a second command that writes it"
        logging.getLogger(__name__).warning(said, output, error.strerror)
    try:
        if lock.is_locked:
            path.write_text(json.dumps(_this_process()), encoding="utf-8")
        yield
    finally:
        # While the lock is held: a process that has opened this file already notices that it was removed.
        path.unlink(missing_ok=True)
        lock.release()
        if is_new:  # a command that wrote nothing leaves no folder
            with contextlib.suppress(OSError):
                output.rmdir()


def holder(output: Path, *, inside: bool = False) -> str | None:
    """The process that holds the lock of an output, as text; None if no process does, as far as this machine knows."""
    path = lock_file(output, inside=inside)
    return _holder(path) if _is_held(path) else None


def killed_holder(output: Path, *, inside: bool = False, since: float = 0.0) -> str | None:
    """The process that left the lock file of an output without holding it, so that it was killed; None if none did.

    since: a process that took the lock before this time does not count.
    """
    path = lock_file(output, inside=inside)
    with contextlib.suppress(OSError):  # removed in between
        if _is_held(path) is False and path.stat().st_mtime > since:
            return _holder(path)
    return None


def _is_held(path: Path) -> bool | None:
    """Whether a process holds this lock file; None if there is no such file, or if its file system has no locks."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment; `hold` would wait for it and try again
        return False if os.fstat(file).st_nlink else None  # removed: its holder has just ended
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)


def _this_process() -> dict[str, object]:
    return {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _holder(path: Path) -> str:
    """The holder of a lock as text, as far as it has written its lock file."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['process']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
