"""Resolve, pull and unpack in one go, through the real puller child."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.config import ImagesConfig
from agent.images.layout import Store
from agent.images.pull import pull, resolve, unpack
from agent.model.spec import Model


def images_config(**fields: Any) -> ImagesConfig:
    """Few retries and no reserve, unless `fields` say otherwise."""
    return ImagesConfig(**{"keep_free": 0, "retries": 1, "timeout": 10.0, **fields})


async def open_store(folder: Path, config: ImagesConfig) -> Store:
    store = Store(folder, config)
    await store.open()
    return store


async def fetch(reference: str, store: Store, config: ImagesConfig) -> Model:
    """The model that `reference` names, as a deployment would get it."""
    digest = await resolve(reference, config)
    await pull(reference, digest, store, config, lambda progress: None)
    await unpack(digest, store, config, lambda progress: None, reference=reference)
    return store.model(digest)
