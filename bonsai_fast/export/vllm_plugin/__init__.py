"""What vLLM calls when it starts (entry point `vllm.general_plugins`); nothing else imports it.

Pruned models then load without `trust_remote_code`, and those of LLaMA's block run on vLLM's native
layers, also where a layer has no attention. Others run on vLLM's Transformers backend.
"""

from __future__ import annotations

from bonsai_fast.hub import register as register_with_transformers

# Their blocks differ in biases alone, which vLLM's layers have, too.
NATIVE_FAMILIES = ("Llama", "Mistral", "Qwen2")
NATIVE_CLASS = "bonsai_fast.export.vllm_plugin.llama:BonsaiForCausalLM"


def register() -> None:
    """Make vLLM know the model classes. They are imported by vLLM, later and where they run."""
    from vllm import ModelRegistry

    register_with_transformers()
    for family in NATIVE_FAMILIES:
        ModelRegistry.register_model(f"Bonsai{family}ForCausalLM", NATIVE_CLASS)
