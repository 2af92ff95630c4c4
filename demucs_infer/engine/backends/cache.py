"""What engines have compiled, kept in a folder, and trusted only as far as the user's own files.

Another's file there could give other stems, or worse: the parsers of engines are not made for
strangers. So the folder must belong to the user, nobody else may write to it, and beside each file
stands its SHA-256.
"""

from __future__ import annotations

import os
import stat
import sys
from hashlib import sha256
from pathlib import Path

from ...log import logger
from ...utils import appearing


class CompiledCache:
    """The files of one engine in `folder`; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def load(self, name: str) -> bytes | None:
        """The content that was stored under `name`, if it is there and as it was."""
        if self.folder is None or not (self.folder / name).exists():
            return None
        try:
            if not _is_ours(self.folder):
                logger.warning("%s: others may write there: nothing of it is used", self.folder)
                return None
            content = (self.folder / name).read_bytes()
            digest = self._digest_file(name).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return content if sha256(content).hexdigest() == digest else None

    def store(self, name: str, content: bytes) -> None:
        """Keep `content` under `name`, if the folder allows it."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with appearing(self.folder / name) as temporary:
                temporary.write_bytes(content)
            with appearing(self._digest_file(name)) as temporary:
                temporary.write_text(sha256(content).hexdigest() + "\n")
        except OSError as exc:
            logger.info("what was compiled is not kept: %s", exc)

    def _digest_file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.sha256"


def _is_ours(folder: Path) -> bool:
    """Whether only this user, or root, may write to `folder`; Windows keeps caches in the home."""
    if sys.platform == "win32":
        return True
    status = folder.stat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (0, os.getuid()) and not writable
