"""A model's sizes from its config: no weights are loaded."""

from __future__ import annotations

from trsr_dist.planning.shape import ModelShape


def model_shape(name_or_path: str, revision: str = "", trust_remote_code: bool = False) -> ModelShape:
    """Sizes of a local model or one of the hub, of which only its config is fetched.

    Raises:
        ModelError: there is no config, or it lacks a size.
    """
    from trsr_dist.pretrained import BaseSource, load_config

    source = BaseSource(name_or_path, revision, trust_remote_code)
    return ModelShape.from_config(load_config(source).to_dict())
