"""Model classes that a pruned model needs, and the files that travel with it.

Two files are copied beside the weights, whatever the family: `configuration_bonsai.py` and
`modeling_bonsai.py`. They run there with `trust_remote_code=True` on a machine without this
package, so nothing in them may import the rest of bonsai_fast.
"""

from __future__ import annotations

from bonsai_fast.hub.auto_classes import HubClasses, hub_classes, model_types, register
from bonsai_fast.hub.configuration_bonsai import HeterogeneousConfig, LayerShape, pruned_config

__all__ = [
    "HeterogeneousConfig",
    "HubClasses",
    "LayerShape",
    "hub_classes",
    "model_types",
    "pruned_config",
    "register",
]
