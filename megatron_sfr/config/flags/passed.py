"""Megatron's flags that are passed on: Megatron reads them, and nothing of ours stands in the way.

By the groups of Megatron's own parser. A test fails by name when Megatron adds or drops a flag.
"""

PASSED = {
    "transformer configuration": """
        tensor_model_parallel_size tensor_parallel_num_weight_shards pipeline_model_parallel_comm_backend
        pipeline_model_parallel_size sequence_parallel expert_model_parallel_size expert_tensor_parallel_size
        expert_tensor_parallel_num_weight_shards perform_initialization use_cpu_initialization fp16 bf16
        deterministic_mode tp_comm_overlap tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag
        tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_bootstrap_backend
        overlap_dispatch_backward_with_experts_wgrad use_ring_exchange_p2p defer_embedding_wgrad_compute
        wgrad_deferral_limit overlap_p2p_comm_warmup_flush microbatch_group_size_per_vp_stage mtp_standalone
        cpu_offloading_num_layers cpu_offloading_retain_pinned_cpu_buffers mtp_loss_scaling_factor
        mtp_use_repeated_layer mtp_detach_heads account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split hidden_size num_attention_heads attention_backend
        flash_attention_version softmax_type num_query_groups ffn_hidden_size kv_channels hidden_dropout
        attention_dropout fp32_residual_connection apply_residual_connection_post_layernorm layernorm_epsilon
        layernorm_zero_centered_gamma add_bias_linear add_qkv_bias glu_linear_offset activation_func_clamp_value
        rotary_interleaved normalization qk_layernorm qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold
        attention_output_gate multi_latent_attention experimental_attention_variant dsa_indexer_n_heads
        dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset
        dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_kernel_backend dsa_indexer_rope_interleaved
        dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
        dsa_indexer_k_norm_fp32 linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim
        linear_num_key_heads linear_num_value_heads init_method_std embedding_init_method_std
        init_model_with_meta_device use_mup mup_width_mult mup_base_hidden_size mup_embedding_mult
        mup_output_mult mup_base_head_dim mup_attn_scale_power apply_query_key_layer_scaling
        disable_bf16_reduced_precision_matmul use_fused_weighted_squared_relu fused_residual_rmsnorm
        use_transformer_engine_op_fuser recompute_method recompute_num_layers distribute_saved_activations fp8
        fp8_recipe fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo
        fp8_wgrad fp8_output_proj first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
        use_kitchen_attention kitchen_attention_backend fp4 fp4_recipe fp4_quantizer_factory
        high_priority_a2a_comm_stream moe_shared_expert_intermediate_size moe_shared_expert_gate
        moe_shared_expert_overlap use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size
        moe_ffn_hidden_size moe_router_topk moe_enable_routing_replay moe_router_padding_for_quantization
        moe_router_padding_for_fp8 moe_router_num_groups moe_router_group_topk moe_router_pre_softmax
        moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype moe_router_enable_expert_bias
        moe_router_bias_update_rate moe_router_quantile_balancing_ema moe_router_force_load_balancing
        moe_router_force_biased use_grouped_gemm_for_dense_mlp moe_grouped_gemm moe_single_grouped_weight
        moe_single_grouped_bias moe_z_loss_coeff moe_input_jitter_eps moe_token_dispatcher_type
        moe_enable_deepep moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep
        moe_hybridep_pad_uneven_dispatch_inputs moe_per_layer_logging moe_expert_capacity_factor
        moe_pad_expert_input_to_capacity moe_pad_experts_for_cuda_graph_inference moe_token_drop_policy
        moe_layer_recompute moe_permute_fusion moe_router_fusion moe_apply_probs_on_input moe_latent_size
        moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape
        moe_ncclep_zero_copy moe_mlp_glu_interleave_size moe_expert_rank_capacity_factor enable_cuda_graph
        cuda_graph_warmup_steps external_cuda_graph inference_cuda_graph_scope clone_scatter_output_in_embedding
        config_logger_dir flash_decode batch_invariant_mode use_te_activation_func symmetric_ar_type
        nccl_all_reduce_for_prefill inference_fuse_tp_communication inference_disable_triton_nvls_kernels
        inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels
        inference_moe_token_dispatcher_type mlp_chunks_for_prefill mlp_chunks_for_training
        fine_grained_activation_offloading offload_modules min_offloaded_tensor_size
        delay_offload_until_cuda_graph delta_offload_bytes_across_pp_ranks activation_offload_fraction
        moe_paged_stash moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda
        moe_paged_stash_buffer_size_factor_cpu fine_grained_offloading_max_inflight_offloads
    """,
    "network size": """
        encoder_num_layers group_query_attention window_attn_skip_freq max_position_embeddings
        yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int
        use_rotary_position_embeddings rotary_base rotary_percent rotary_seq_len_interpolation_factor
        use_rope_scaling no_rope_freq add_position_embedding make_vocab_size_divisible_by openai_gelu
        squared_relu swiglu quick_geglu onnx_safe untie_embeddings_and_output_weights
    """,
    "regularization": """
        weight_decay apply_wd_to_qk_layernorm clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum
        muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type
        muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2
        no_weight_decay_cond_type
    """,
    "profiling": """
        record_memory_history memory_snapshot_path
    """,
    "training": """
        rampup_batch_size step_batch_size_schedule decrease_batch_size_if_needed empty_unused_memory_level
        check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval train_sync_interval train_samples
        exit_interval exit_duration_in_mins exit_signal_handler_for_dataloader exit_signal_handler_for_training
        manual_gc manual_gc_interval manual_gc_eval batch_size recompute_activations check_for_large_grads
        tp_comm_overlap_cfg checkpoint_activations bias_gelu_fusion bias_swiglu_fusion bias_dropout_fusion
        apply_rope_fusion rope_type use_flash_attn optimizer optimizer_cuda_graph optimizer_offload_fraction
        use_torch_optimizer_for_cpu_offload overlap_cpu_optimizer_d2h_h2d dump_param_to_param_group_map
        pin_cpu_grads pin_cpu_params no_persist_layer_norm gradient_accumulation_fusion
        deprecated_use_mcore_models
    """,
    "RNG and initialization": """
        te_rng_tracker inference_rng_tracker data_parallel_random_init init_method_xavier_uniform
    """,
    "learning rate and weight decay": """
        lr_decay_style lr_wsd_decay_style lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples
        lr_warmup_fraction lr_warmup_samples lr_warmup_init override_opt_param_scheduler
        use_checkpoint_opt_param_scheduler start_weight_decay end_weight_decay weight_decay_incr_style lr warmup
        min_lr decoupled_lr decoupled_min_lr freeze_all_layers
    """,
    "checkpointing": """
        save_interval save_params_interval save_activations_interval save_tokens_per_expert_interval
        save_wgrads_interval save_dgrads_interval save_retain_interval load_main_params_from_ckpt
        non_persistent_save_interval non_persistent_ckpt_type non_persistent_global_ckpt_dir
        non_persistent_local_ckpt_dir non_persistent_local_ckpt_algo ckpt_step use_checkpoint_args
        use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args ckpt_format
        auto_detect_ckpt_format ckpt_convert_format ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format
        ckpt_fully_parallel_save async_strategy use_persistent_ckpt_worker async_ckpt_cpu_priority
        async_ckpt_io_priority async_ckpt_use_cpu_shm ckpt_fully_parallel_load
        ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_save_process_group
        ckpt_fully_parallel_load_process_group ckpt_assume_constant_structure
        ckpt_load_validate_sharding_integrity strict_fsdp_dtensor_load dist_ckpt_strictness
        dist_ckpt_save_pre_mcore_014 dist_ckpt_optim_fully_reshardable
        distrib_optim_fully_reshardable_mem_efficient replication replication_jump replication_factor
        verify_integrity stream_ckpt_dequant no_save_optim no_save_rng no_load_optim no_load_rng
        override_ckpt_iteration use_dist_ckpt_deprecated dist_ckpt_format_deprecated dist_ckpt_workers
        ckpt_fully_parallel_save_deprecated
    """,
    "mixed precision": """
        grad_reduce_in_bf16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis
        attention_softmax_in_fp32 accumulate_allreduce_grads_in_fp32 reuse_grad_buf_for_mxfp8_param_ag
    """,
    "distributed init": """
        distributed_backend distributed_timeout_minutes align_grad_reduce local_rank lazy_mpu_init
        use_megatron_fsdp use_torch_fsdp2 nccl_communicator_config_path use_tp_pp_dp_mapping
        use_gloo_process_groups use_sharp sharp_enabled_group high_priority_stream_groups
        distributed_timeout_seconds_after_init flight_recorder_dump_path flight_recorder_trace_buffer_size
        flight_recorder_dump_on_timeout flight_recorder_include_stack_trace flight_recorder_include_only_active
        flight_recorder_extra_dump_on_exec disable_jit_fuser decoder_first_pipeline_num_layers
        decoder_last_pipeline_num_layers pipeline_model_parallel_layout model_parallel_size
        num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank overlap_p2p_comm
        overlap_grad_reduce ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw
        ddp_reduce_scatter_with_fp32_accumulation ddp_param_name_patterns_for_fp32_local_accumulation
        overlap_param_gather overlap_param_gather_with_optimizer_step
        align_param_gather use_distributed_optimizer use_layer_wise_param_layout nccl_ub
        disable_symmetric_registration fsdp_manual_registration create_all_gather_group
        data_parallel_sharding_strategy outer_dp_sharding_strategy gradient_reduce_div_fusion fsdp_double_buffer
        suggested_communication_unit_size keep_fp8_transpose_cache enable_full_sharding_in_hsdp
        num_distributed_optimizer_instances torch_fsdp2_reshard_after_forward fake_process_group
    """,
    "validation": """
        start_eval_at_iter skip_train test_mode
    """,
    "data and dataloader": """
        encoder_seq_length num_workers
    """,
    "tokenizer": """
        padded_vocab_size pad_vocab_size
    """,
    "autoresume": """
        adlr_autoresume adlr_autoresume_interval
    """,
    "vision": """
        data_sharding
    """,
    "moe": """
        num_experts moe_layer_freq moe_use_upcycling moe_router_load_balancing_type moe_aux_loss_coeff
        moe_upcycling_granularity
    """,
    "mla": """
        q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rotary_scaling_factor mscale
        mscale_all_dim cache_mla_latents mla_down_proj_fusion
    """,
    "experimental_attention_variant": """
        linear_attention_freq
    """,
    "logging": """
        log_interval log_params_norm log_throughput log_progress timing_log_level timing_log_option
        tensorboard_log_interval tensorboard_queue_size log_timers_to_tensorboard log_loss_scale_to_tensorboard
        log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_memory_interval log_device_memory_used
        log_num_zeros_in_grad log_max_attention_logit barrier_with_L1_time log_world_size_to_tensorboard
        wandb_project wandb_exp_name wandb_save_dir wandb_entity logging_level log_energy moe_routing_trace_path
        moe_routing_trace_max_training_iters moe_routing_trace_capture_logits
        moe_routing_trace_capture_hidden_states moe_routing_trace_dump_weights
    """,
    "straggler": """
        log_straggler straggler_ctrlr_port straggler_minmax_count disable_straggler_on_startup
    """,
    "workload inspector": """
        run_workload_inspector_server
    """,
    "Transformer-Engine": """
        fp4_param_gather fp8_param_gather te_precision_config_file
    """,
    "experimental": """
        enable_experimental main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype
        megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype
        megatron_fsdp_enable_fine_grained_param_gather megatron_fsdp_max_pool_double_buffer
        fsdp_db_use_persist_buf_on_alloc_fail
    """,
    "one logger": """
        enable_one_logger one_logger_project one_logger_run_name one_logger_async app_tag_run_name
        app_tag_run_version
    """,
    "ft_package": """
        enable_ft_package calc_ft_timeouts ft_num_warmup_iters
    """,
    "rerun engine": """
        error_injection_rate error_injection_type rerun_mode
    """,
    "msc": """
        enable_msc disable_msc_deprecated
    """,
    "fault injector": """
        fault_injector_ranks fault_injector_num_ranks fault_injector_fault_types
        fault_injector_fault_probabilities fault_injector_fault_delay fault_injector_delay_start_iteration
        fault_injector_mtti_seconds fault_injector_offset_seconds fault_injector_seed
    """,
}
