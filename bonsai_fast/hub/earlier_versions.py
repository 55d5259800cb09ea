"""The cut table of directories that have none: earlier versions had two files for each family."""

from __future__ import annotations

from typing import Any, NamedTuple

PRE_NORM = ("input_layernorm", "post_attention_layernorm")
OPT_NORMS = ("self_attn_layer_norm", "final_layer_norm")
# rows of a projection that belong to one head, in multiples of head_dim, or to one channel
SEPARATE = {"q_proj": {"heads": 1}, "k_proj": {"kv_heads": 1}, "v_proj": {"kv_heads": 1}}
STACKED = {"qkv_proj": {"heads": 1, "kv_heads": 2}}
INTERLEAVED = {"query_key_value": {"heads": 1, "kv_heads": 2}}
GATED = {"gate_proj": 1, "up_proj": 1}


class Names(NamedTuple):
    """What the parts of a decoder layer are called in one family."""

    layers: str = "layers"
    attention: str = "self_attn"
    query: dict[str, dict[str, int]] = SEPARATE
    attention_output: str = "o_proj"
    mlp: str = "mlp"  # "" if its projections belong to the layer itself
    inputs: dict[str, int] = GATED
    mlp_output: str = "down_proj"
    norms: tuple[str, ...] = PRE_NORM


TALL = Names(query=INTERLEAVED, attention_output="dense", mlp_output="dense_4h_to_h")
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), Names()),
    "phi3": Names(query=STACKED, inputs={"gate_up_proj": 2}),
    "phi": Names(attention_output="dense", inputs={"fc1": 1}, mlp_output="fc2", norms=()),
    "opt": Names(
        layers="decoder.layers",
        attention_output="out_proj",
        mlp="",
        inputs={"fc1": 1},
        mlp_output="fc2",
        norms=OPT_NORMS,
    ),
    "bloom": TALL._replace(layers="h", attention="self_attention", inputs={"dense_h_to_4h": 1}),
    "gpt_neox": TALL._replace(attention="attention", inputs={"dense_h_to_4h": 1}),
}


def earlier_cut_table(config: Any) -> dict[str, Any] | None:
    """`HeterogeneousConfig.cut_table` for one of the ten families that earlier versions saved."""
    family = config.model_type.removeprefix("bonsai_")
    names = FAMILIES.get(family)
    if names is None:
        return None
    with config.as_dense():
        return {"layers": names.layers, "kinds": [_kind(config, family, names)]}


def _kind(config: Any, family: str, names: Names) -> dict[str, Any]:
    norms = names.norms
    if not getattr(config, "do_layer_norm_before", True) or getattr(
        config, "apply_residual_connection_post_layernorm", False
    ):
        norms = ()
    heads = config.num_attention_heads
    attention, width = names.attention, config.head_dim
    mlp = f"{names.mlp}." if names.mlp else ""
    output = f"{mlp}{names.mlp_output}"
    query = {
        name: {part: share * width for part, share in shares.items()}
        for name, shares in names.query.items()
    }
    counts = {"num_heads": "heads", "num_key_value_heads": "kv_heads"}
    counts |= {"num_key_value_groups": "groups"}
    kind = {
        "attention": {
            "modules": [attention],
            "output": f"{attention}.{names.attention_output}",
            "norms": list(norms[:1]),
            "returns": 2,
            "heads": heads,
            "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
            "sizes": {
                **_rows(f"{attention}.", query),
                f"{attention}.{names.attention_output}.weight": {"1": {"heads": width}},
            },
            "counts": {f"{attention}.{name}": {part: 1} for name, part in counts.items()},
        },
        "mlp": {
            "modules": [names.mlp] if names.mlp else [*names.inputs, names.mlp_output],
            "output": output,
            "norms": list(norms[1:]),
            "returns": None,
            "channels": getattr(config, config.channels_attribute) or 4 * config.hidden_size,
            "sizes": {
                **_rows(mlp, {name: {"channels": rows} for name, rows in names.inputs.items()}),
                f"{output}.weight": {"1": {"channels": 1}},
            },
            "counts": {},
        },
    }
    if family == "bloom":
        kind["attention"]["alibi"] = "alibi"
    return kind


def _rows(prefix: str, shares: dict[str, dict[str, int]]) -> dict[str, dict[str, dict[str, int]]]:
    """Sizes of weights and biases; a model without the biases ignores them."""
    return {
        f"{prefix}{name}.{attribute}": {"0": share}
        for name, share in shares.items()
        for attribute in ("weight", "bias")
    }
