"""Megatron's flags that have no effect or a wrong one here, each with the reason and a remedy.

Read against megatron-core 0.19.2: our data, step or model take the place of the code that these flags steer. A flag is
refused where it is set to something else than its default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_sfr.doctor.resilience import has_usable_version
from megatron_sfr.runtime.backend import choose

OUT = "leave it out"


@dataclass(frozen=True)
class Refused:
    """Flags that are refused, by their names in upstream's arguments.

    when: of the flag's value and all arguments; None refuses every value but the default.
    condition: `when` in words, for the documentation.
    """

    names: str
    reason: str
    remedy: str = OUT
    when: Callable[[Any, Any], bool] | None = None
    condition: str = ""


def _full_iteration(value: Any, _: Any) -> bool:
    return "full_iteration" in str(value)


def _without_a_writer(_: Any, args: Any) -> bool:
    worker = args.use_persistent_ckpt_worker and choose(args.sfr_backend) != "cpu"
    return not worker or (args.async_strategy == "nvrx" and not has_usable_version())


def _without_profile(_: Any, args: Any) -> bool:
    return not args.profile


def _without_torchs_profiler(_: Any, args: Any) -> bool:
    return not (args.profile and args.use_pytorch_profiler)


def _without_nsys(_: Any, args: Any) -> bool:
    return not args.profile or args.use_pytorch_profiler


def _nsys_on_cpu(_: Any, args: Any) -> bool:
    return not args.use_pytorch_profiler and choose(args.sfr_backend) == "cpu"


def _several_iterators(_: Any, args: Any) -> bool:
    chunks = args.num_layers_per_virtual_pipeline_stage or args.num_virtual_stages_per_pipeline_rank
    return args.tensor_model_parallel_size > 1 or bool(chunks) or "|" in (args.hybrid_layer_pattern or "")


DATA = (
    Refused("mock_data", "training reads prepared folders", "name one in train_data_path"),
    Refused(
        "data_args_path per_split_data_args_path",
        "the folders of a run are read from train_data_path, valid_data_path, test_data_path and data_path alone",
        "list them there, with their weights",
    ),
    Refused(
        "per_dataset_sequences_path dataloader_fast_cache_load dataloader_defer_npy_index_mmap "
        "object_storage_cache_path",
        "prepared folders are on a local file system, and their manifests say how large they are",
    ),
    Refused(
        "fim_data fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token "
        "fim_middle_token fim_suffix_token fim_pad_token fim_eod_token",
        "prepared documents are trained on as they are",
        "rearrange the texts before `megatron-sfr prepare-text`",
    ),
    Refused(
        "sft sft_tokenizer_prompt_format",
        "conversations and their loss masks come from `megatron-sfr prepare`, not from Megatron's SFT dataset",
    ),
    Refused(
        "tokenizer_type",
        "prepared data are token ids; no tokenizer is loaded in training",
        "leave it out and set vocab_size",
        lambda value, _: value not in (None, "NullTokenizer"),
        "other than NullTokenizer",
    ),
    Refused(
        "tokenizer_model vocab_file merge_file metadata_path special_tokens tiktoken_pattern "
        "tiktoken_num_special_tokens tokenizer_sentencepiece_legacy tokenizer_sentencepiece_ignore_extra_whitespaces "
        "tokenizer_hf_no_use_fast tokenizer_hf_no_include_special_tokens trust_remote_code chat_template "
        "vocab_extra_ids",
        "prepared data are token ids; no tokenizer is loaded in training",
        "name the tokenizer in `megatron-sfr prepare`",
    ),
    Refused(
        "null_tokenizer_eod_id null_tokenizer_pad_id allow_ambiguous_pad_tokens",
        "the manifest of prepared documents names their end token, and no token is padding",
    ),
    Refused(
        "reset_position_ids reset_attention_mask",
        "it looks for a token where documents end",
        "set dataloader_inter_document_masking, which knows where documents begin",
    ),
    Refused(
        "dataloader_type",
        "the datasets are Megatron's own kind, which its samplers read",
        "use single or cyclic",
        lambda value, _: value == "external",
        "external",
    ),
    Refused(
        "iterations_to_skip result_rejected_tracker_filename",
        "Megatron skips the batch on the first tensor-parallel rank alone, and here each rank reads its own",
        "leave it out, or train without tensor parallelism and virtual stages",
        _several_iterators,
        "with tensor parallelism or virtual pipeline stages",
    ),
)

STEP = (
    Refused(
        "async_save",
        "Megatron needs use_persistent_ckpt_worker, a GPU and, for async_strategy nvrx, nvidia-resiliency-ext 0.6",
        "set the worker and pip install 'megatron-sfr[resilience]', or async_strategy mcore; on the CPU leave it out",
        _without_a_writer,
        "without use_persistent_ckpt_worker or nvidia-resiliency-ext, and on the CPU",
    ),
    Refused(
        "hybrid_context_parallel hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank",
        "sequences are divided into equal parts over one context-parallel group",
    ),
    Refused(
        "overlap_moe_expert_parallel_comm delay_wgrad_compute ep_overlap_early_attn_memory_release",
        "Megatron asks the forward step for a schedule plan, which ours does not have",
    ),
    Refused(
        "cuda_graph_impl cuda_graph_modules cuda_graph_scope_deprecated",
        "the step copies from the host and keeps values between steps, which a captured iteration would freeze",
        "use cuda_graph_impl local or transformer_engine",
        _full_iteration,
        "full_iteration",
    ),
    Refused(
        "logits_save_dir logits_save_top_k logits_save_top_p logits_save_top_p_min_k logits_save_dtype",
        "Megatron turns its own loss off while it saves logits, so that weights stay; ours would train on",
    ),
    Refused(
        "logits_load_dir logits_load_decode_threads logits_load_prefetch_factor logits_load_msc_prefetch_depth "
        "logits_load_kd_loss_alpha logits_load_ignore_errors",
        "distillation is part of Megatron's own loss function; asft reads what `megatron-sfr reference` wrote",
    ),
    Refused(
        "cross_entropy_loss_fusion cross_entropy_fusion_impl fp16_lm_cross_entropy",
        "the losses of tokens, multi-token prediction's included, have kernels of this package",
        OUT,
    ),
    Refused(
        "profile_step_start profile_step_end profile_ranks use_pytorch_profiler",
        "no step is profiled without profile",
        "set profile_steps for torch's profiler, or profile for nsys",
        _without_profile,
        "without profile",
    ),
    Refused(
        "pytorch_profiler_collect_shapes pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra",
        "it belongs to torch's profiler",
        "set profile_steps too",
        _without_torchs_profiler,
        "without torch's profiler",
    ),
    Refused(
        "record_shapes nvtx_ranges",
        "only nsys reads it",
        "set profile without use_pytorch_profiler, or leave it out",
        _without_nsys,
        "without nsys",
    ),
    Refused(
        "profile",
        "nsys profiles CUDA",
        "set profile_steps, which traces with torch's profiler",
        _nsys_on_cpu,
        "on the CPU without use_pytorch_profiler",
    ),
    Refused("ddp_average_in_collective", "gradients are divided by the tokens of the global batch, not by ranks"),
    Refused("check_for_spiky_loss", "Megatron's own loss function makes this check, and ours takes its place"),
    Refused(
        "inprocess_restart inprocess_max_iterations inprocess_monitor_thread_interval "
        "inprocess_monitor_process_interval inprocess_progress_watchdog_interval inprocess_heartbeat_interval "
        "inprocess_soft_timeout inprocess_hard_timeout inprocess_heartbeat_timeout inprocess_barrier_timeout "
        "inprocess_completion_timeout inprocess_last_call_wait inprocess_termination_grace_time "
        "inprocess_granularity inprocess_active_world_size inprocess_empty_cuda_cache",
        "restarting inside of the process is part of Megatron's own start script",
        "let torchrun restart: --max-restarts",
    ),
    Refused(
        "perform_rl_step rl_prompts_per_eval grpo_prompts_per_step grpo_group_size rl_generation_lag "
        "rl_submission_granularity rl_consumption_granularity grpo_iterations grpo_clamp_eps_lower "
        "grpo_clamp_eps_upper grpo_kl_beta grpo_entropy_term_weight grpo_filter_groups_with_same_reward "
        "langrl_env_config rl_default_temperature rl_default_top_p rl_default_top_k "
        "rl_offload_optimizer_during_inference rl_kv_cache_management_mode rl_persist_cuda_graphs "
        "rl_partial_rollouts rl_inference_logprobs_is_correction rl_importance_sampling_truncation_coef "
        "rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin rl_sequence_packing_algo "
        "rl_training_cuda_graphs rl_inference_tensor_model_parallel_size rl_inference_pipeline_model_parallel_size "
        "rl_inference_expert_model_parallel_size rl_inference_expert_tensor_model_parallel_size "
        "rl_inference_model_unified_memory_level rl_offload_inference_model_weights_when_idle refit_method "
        "rl_verify_model_weights_swap rl_skip_bos_token rl_profile rl_profile_dir rl_inference_parsers",
        "reinforcement learning has its own data and loss in Megatron; this program trains on prepared folders",
    ),
)

MODEL = (
    Refused("yaml_cfg", "it replaces all arguments, ours too", "write the options into the recipe"),
    Refused(
        "hybrid_layer_pattern mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path "
        "mamba_training_ssm_states_dtype",
        "it belongs to Megatron's HybridModel, and the model is its GPTModel",
        "set model_class to hybrid, or leave it out",
        lambda _, args: args.model_class == "gpt",
        "with model_class gpt",
    ),
    Refused(
        "hybrid_override_pattern mtp_hybrid_override_pattern is_hybrid_model",
        "Megatron has deprecated it, or sets it itself",
        "set model_class to hybrid and hybrid_layer_pattern",
    ),
    Refused(
        "position_embedding_type",
        "this program trains on text with one position for each token, and Megatron's GPT knows no relative embedding",
        "use rope, yarn, learned_absolute or none",
        lambda value, _: value in ("mrope", "relative"),
        "mrope, relative",
    ),
    Refused("mrope_section", "positions of images are not read", OUT),
    Refused(
        "relative_attention_num_buckets relative_attention_max_distance decoder_num_layers decoder_seq_length "
        "bert_binary_head mask_prob short_seq_prob",
        "it belongs to BERT and T5; the model is Megatron's GPT",
    ),
    Refused(
        "heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json",
        "the local layer specification that this program uses is the same for every layer",
        "train with Transformer Engine on CUDA",
        lambda _, args: args.transformer_impl == "local",
        "with transformer_impl local",
    ),
    Refused(
        "ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load bert_load "
        "titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path retriever_report_topk_accuracies "
        "retriever_score_scaling block_data_path embedding_path indexer_batch_size indexer_log_interval "
        "output_bert_embeddings bert_embedder_type",
        "it belongs to Megatron's retrievers; the model is Megatron's GPT",
    ),
    Refused(
        "num_classes img_h img_w num_channels patch_dim classes_fraction data_per_class_fraction head_lr_mult "
        "vision_pretraining vision_pretraining_type vision_backbone_type swin_backbone_type mask_type mask_factor "
        "iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size dino_bottleneck_size "
        "dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp "
        "dino_warmup_teacher_temp_epochs sample_rate",
        "it belongs to Megatron's vision models; the model is Megatron's GPT",
    ),
    Refused(
        "inference_batch_times_seqlen_threshold max_tokens_to_oom use_legacy_static_engine inference_max_requests "
        "inference_max_seq_length inference_dynamic_batching inference_dynamic_batching_buffer_size_gb "
        "inference_dynamic_batching_paused_buffer_size_gb inference_dynamic_batching_mamba_memory_ratio "
        "inference_dynamic_batching_block_size inference_dynamic_batching_max_requests "
        "inference_dynamic_batching_max_tokens inference_dynamic_batching_num_cuda_graphs "
        "inference_dynamic_batching_track_paused_request_events "
        "inference_dynamic_batching_track_generated_token_events decode_only_cuda_graphs "
        "inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens "
        "inference_dynamic_batching_unified_memory_level enable_chunked_prefill num_speculative_tokens "
        "inference_dynamic_batching_enable_prefix_caching "
        "inference_dynamic_batching_prefix_caching_eviction_policy "
        "inference_dynamic_batching_prefix_caching_coordinator_policy "
        "inference_dynamic_batching_prefix_caching_routing_alpha "
        "inference_dynamic_batching_prefix_caching_mamba_gb "
        "inference_dynamic_batching_cuda_graph_mixed_prefill_count "
        "inference_dynamic_batching_cuda_graph_sizing_distribution inference_dynamic_batching_sampling_backend "
        "offset_sampling_seed_by_dp_rank inference_dynamic_batching_async_sched_mode "
        "inference_dynamic_batching_logprobs_mode inference_logging_step_interval "
        "inference_text_gen_server_logging inference_wandb_logging inference_coordinator_port "
        "mamba_inference_conv_states_dtype mamba_inference_ssm_states_dtype inference_use_synchronous_zmq_collectives "
        "inference_disable_ep_consensus inference_shards",
        "it steers Megatron's inference engine, which training does not start",
        "export the model, and set it in the engine that serves it",
    ),
)

REFUSED = (*DATA, *STEP, *MODEL)
