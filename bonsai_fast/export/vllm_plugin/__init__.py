"""The vLLM plugin (entry point `vllm.general_plugins`); nothing else imports it.

With it, pruned models load without `trust_remote_code`. Models with LLaMA's block run on vLLM's
native layers, even if some layers have no attention; others run on vLLM's Transformers backend.
"""

from __future__ import annotations

from bonsai_fast.hub import register as register_with_transformers

# Their blocks differ only in biases, which vLLM's layers support.
NATIVE_FAMILIES = ("Llama", "Mistral", "Qwen2")
NATIVE_CLASS = "bonsai_fast.export.vllm_plugin.llama:BonsaiForCausalLM"


def register() -> None:
    """Register the model classes; vLLM imports them later, in the process that runs them."""
    from vllm import ModelRegistry

    register_with_transformers()
    for family in NATIVE_FAMILIES:
        ModelRegistry.register_model(f"Bonsai{family}ForCausalLM", NATIVE_CLASS)
