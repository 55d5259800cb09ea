"""Configuration of a model in the layout of DeciLM (Nemotron-NAS), as vLLM and others read it."""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig


class Entry(dict):
    """A dictionary whose values are attributes, too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


@strict
class DeciLMConfig(LlamaConfig):
    """LlamaConfig with `block_configs`: what each layer has, reached by attributes."""

    model_type = "nemotron-nas"

    block_configs: list[dict] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.block_configs = [
            Entry({name: Entry(part) for name, part in block.items()})
            for block in self.block_configs or ()
        ]

    def validate_architecture(self):
        """A head's width need not follow from the hidden size."""
