"""The names that SGLang, vLLM and Megatron have for groups, their sizes and ranks: data alone.

Keys are our groups, and four groups that depend on the layout of cp. `parallel_state.py` makes
functions of these names.
"""

__all__ = ["ATTRIBUTES", "BY_CP_LAYOUT", "GROUPS", "SIZES_AND_RANKS"]

BY_CP_LAYOUT = {
    "attention_cp": {"inside_tp": "cp", "beside_tp": "cp", "adjacent_in_tp": "rank_alone"},
    "decode_cp": {"inside_tp": "rank_alone", "beside_tp": "rank_alone", "adjacent_in_tp": "cp"},
    "prefill_cp": {"inside_tp": "rank_alone", "beside_tp": "cp", "adjacent_in_tp": "rank_alone"},
    "attention_tp": {"inside_tp": "attn_tp", "beside_tp": "attn_tp", "adjacent_in_tp": "tp"},
}
"""What is which of our groups by `cp_layout`. A kind of cp that a layout hasn't is one rank alone.

Decode context parallelism splits the cache and not the weights of attention, whose tensor
parallelism stays all of tp.
"""

GROUPS = {
    "world": ("get_world_group",),
    "tp": ("get_tp_group", "get_tensor_model_parallel_group"),
    "cp": ("get_cp_group",),
    "attention_cp": (
        "get_attn_cp_group", "get_attention_cp_group", "get_context_parallel_group",
        "get_moe_dp_group",
    ),
    "decode_cp": ("get_dcp_group", "get_context_model_parallel_group"),
    "prefill_cp": ("get_pcp_group",),
    "attention_tp": ("get_attn_tp_group", "get_attention_tp_group"),
    "pp": ("get_pp_group", "get_pipeline_model_parallel_group"),
    "dp": ("get_dp_group", "get_data_parallel_group"),
    "ep": ("get_ep_group", "get_moe_ep_group", "get_expert_model_parallel_group"),
    "moe_tp": ("get_moe_tp_group", "get_expert_tensor_parallel_group"),
}  # fmt: skip
"""Functions that return a group, by the group."""

SIZES_AND_RANKS = {
    "world": (("get_world_size", "get_world_rank"),),
    "tp": (("get_tensor_model_parallel_world_size", "get_tensor_model_parallel_rank"),),
    "attention_cp": (
        ("get_attn_context_model_parallel_world_size", "get_attn_context_model_parallel_rank"),
        ("get_attention_cp_size", "get_attention_cp_rank"),
        ("get_context_parallel_world_size", "get_context_parallel_rank"),
        ("get_moe_data_parallel_world_size", "get_moe_data_parallel_rank"),
    ),
    "decode_cp": (
        ("get_decode_context_model_parallel_world_size", "get_decode_context_model_parallel_rank"),
        ("get_dcp_world_size", "get_dcp_rank"),
    ),
    "prefill_cp": (
        (
            "get_prefill_context_model_parallel_world_size",
            "get_prefill_context_model_parallel_rank",
        ),
    ),
    "attention_tp": (
        ("get_attn_tensor_model_parallel_world_size", "get_attn_tensor_model_parallel_rank"),
        ("get_attention_tp_size", "get_attention_tp_rank"),
    ),
    "pp": (("get_pipeline_model_parallel_world_size", "get_pipeline_model_parallel_rank"),),
    "dp": (("get_data_parallel_world_size", "get_data_parallel_rank"),),
    "ep": (
        ("get_moe_expert_parallel_world_size", "get_moe_expert_parallel_rank"),
        ("get_expert_model_parallel_world_size", "get_expert_model_parallel_rank"),
    ),
    "moe_tp": (
        ("get_moe_tensor_parallel_world_size", "get_moe_tensor_parallel_rank"),
        ("get_expert_tensor_parallel_world_size", "get_expert_tensor_parallel_rank"),
    ),
}
"""Functions that return a group's `world_size` and this rank's `rank_in_group`, by the group."""

ATTRIBUTES = {
    "get_tensor_model_parallel_src_rank": ("tp", "first_rank"),
    "get_data_parallel_src_rank": ("dp", "first_rank"),
    "get_context_parallel_global_ranks": ("attention_cp", "ranks"),
    "get_pipeline_model_parallel_first_rank": ("pp", "first_rank"),
    "get_pipeline_model_parallel_last_rank": ("pp", "last_rank"),
    "get_pipeline_model_parallel_next_rank": ("pp", "next_rank"),
    "get_pipeline_model_parallel_prev_rank": ("pp", "prev_rank"),
    "is_pipeline_first_stage": ("pp", "is_first_rank"),
    "is_pipeline_last_stage": ("pp", "is_last_rank"),
    "is_global_first_rank": ("world", "is_first_rank"),
}
"""Functions that return another attribute of a group: global ranks, or whether this is the one."""
