"""What is known about the parent of a saved model on this machine: hub name, directory, licence."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load

from bonsai_fast.checkpoints.embedded import NAME, embedded_directory
from bonsai_fast.checkpoints.memory import local_directory

CARD_NAME = "README.md"
# the tag of every card that bonsai_fast writes
TAG = "bonsai_fast"
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Parent:
    """The model that a saved model was made from.

    Attributes:
        name: for people: the hub name, or a directory's last part.
        hub_id: "owner/name" on the hub; None if it is not known.
        directory: where the parent is on this machine; None if it is not there.
        card: metadata of its README.md; empty if it has none.
    """

    name: str
    hub_id: str | None = None
    directory: Path | None = None
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """The name in Markdown."""
        return f"[{self.name}]({HUB}/{self.hub_id})" if self.hub_id else f"`{self.name}`"

    @property
    def licence_link(self) -> str | None:
        """Address of the licence, if the card gives one; that of a file in its repository too."""
        link = self.card.get("license_link")
        if not isinstance(link, str):
            return None
        is_file = "://" not in link and self.hub_id is not None
        return f"{HUB}/{self.hub_id}/blob/main/{link}" if is_file else link


def find_parent(name: str) -> Parent:
    """Look up a parent, offline, by the name or directory that it was loaded from.

    A parent that bonsai_fast saved is not on the hub; its own `base_model` is used instead.
    """
    directory = _directory(name)
    card = _metadata(directory) if directory else {}
    cached = re.search(r"/models--(.+?)--(.+?)/snapshots/", f"{name}/")
    hub_id = None
    tags = card.get("tags")
    if isinstance(tags, list) and TAG in tags:
        hub_id = card.get("base_model")
    elif cached:
        hub_id = f"{cached[1]}/{cached[2]}"
    elif not Path(name).exists() and (directory or re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        hub_id = name
    shown = Path(name).name if Path(name).exists() or hub_id is None else hub_id
    return Parent(shown, hub_id, directory, card)


def _directory(name: str) -> Path | None:
    if name == NAME:
        directory = embedded_directory()
        return directory if directory.is_dir() else None
    try:
        return local_directory(name, download=False)
    except ValueError:
        return None


def _metadata(directory: Path) -> dict[str, Any]:
    try:
        return metadata_load(directory / CARD_NAME) or {}
    except Exception:  # a bad card of the parent must not prevent saving
        return {}
