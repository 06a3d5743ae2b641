"""A remote that is a Hugging Face dataset repository on a disk: cloned before or after, and pushed by git."""

from __future__ import annotations

import logging
from pathlib import Path

from softcache.errors import SpecError, StoreError
from softcache.remote.folder import Folder
from softcache.store import Disk

MOST_FILES = 1000  # in one folder
_ATTRIBUTES = ".gitattributes"
_TO_LFS = b"blobs/** filter=lfs diff=lfs merge=lfs -text\n"


class HuggingFace(Folder):
    """A folder whose blobs go to git's large file storage, and which has a card."""

    public = True
    card = True

    def __init__(self, root: Path, disk: Disk | None = None):
        if not str(root) or str(root) == ".":
            raise SpecError("hf: needs a folder, such as hf:../my-dataset, a clone of the dataset repository")
        super().__init__(root, disk)
        self.where, self.address = f"hf:{root}", f"hf:{root.absolute()}"
        self._told = (root / ".git").exists()

    def put(self, name: str, data: bytes) -> None:
        if not self._told:
            self._told = True
            logging.getLogger(__name__).warning(
                f"{self._store.root} is a folder and no git clone: nothing goes to huggingface.co until a clone of "
                "the dataset repository holds it, and you push that"
            )
        self._send_blobs_to_lfs()
        folder = self._store.path(name).parent
        if (
            folder.is_dir()
            and not self._store.exists(name)
            and sum(1 for _ in folder.iterdir()) >= MOST_FILES
        ):
            raise StoreError(
                f"{folder} holds {MOST_FILES} files, as many as a folder of a repository may: gc it"
            )
        super().put(name, data)

    def _send_blobs_to_lfs(self) -> None:
        rules = self._store.get(_ATTRIBUTES) if self._store.exists(_ATTRIBUTES) else b""
        if _TO_LFS not in rules:
            self._store.put(
                _ATTRIBUTES, rules + b"\n" * (bool(rules) and not rules.endswith(b"\n")) + _TO_LFS
            )
