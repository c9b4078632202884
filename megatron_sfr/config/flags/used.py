"""Megatron's flags that this package reads as well, gives another default, or restricts, each with what that means."""

SEPARATE = "where attention is kept within the texts of a sequence"
USED = {
    "train_data_path valid_data_path test_data_path data_path": "prepared folders, with weights before them in a blend",
    "split": "of `data_path`, over conversations or documents",
    "seed": "also shuffles conversations over sequences, and keys the noise",
    "seq_length": "tokens of a sequence; at least what the data were prepared for",
    "vocab_size": "required; a folder with a token id that is not below it is refused",
    "micro_batch_size eval_micro_batch_size": f"1 with Transformer Engine {SEPARATE}",
    "global_batch_size": "sequences of a step",
    "eval_iters": "0 where there are no validation data",
    "full_validation num_dataset_builder_threads mid_level_dataset_surplus": "handed to Megatron's dataset builder",
    "data_cache_path mmap_bin_files": "of documents",
    "dataloader_inter_document_masking eod_mask_loss": "of documents; conversations have `sfr_packing` and loss masks",
    "create_attention_mask_in_dataloader": "no mask is made there; the forward step makes one where it is needed",
    "phase_transition_iterations": "refused with `sfr_targets: online`",
    "context_parallel_size": "1; larger is refused until batches are divided along the sequence",
    "calculate_per_token_loss": "always on: every term is a sum over the global batch",
    "check_for_nan_in_loss_and_grad": "our loss function makes the same check as Megatron's",
    "transformer_impl": "`local` on a CPU",
    "spec": "kept; without it the local specification is ours",
    "masked_softmax_fusion": f"off {SEPARATE}",
    "rope_scaling_factor": "handed to the model, which Megatron 0.19.2 forgets",
    "mtp_num_layers": f"its loss is beside ours; refused with local attention {SEPARATE}",
    "window_size": f"refused with local attention {SEPARATE}",
    "recompute_granularity recompute_modules": "`sfr_layer` and `kl_flow_time: adaln` refuse what they cannot have",
    "use_precision_aware_optimizer optimizer_cpu_offload": "`sfr_ema: smooth` refuses them",
    "lr_warmup_iters lr_decay_iters train_iters": "a warm-up that does not end before the schedule is refused",
    "save": "also holds recipe.yaml, metrics.jsonl and logs",
    "load pretrained_checkpoint finetune exit_on_missing_checkpoint": (
        "`load` is `save` by default; see `sfr_fresh_head` and `sfr_hf_load`"
    ),
    "tensorboard_dir": "`save`/tensorboard by default",
    "exit_signal_handler exit_signal": "on by default; Ctrl-C counts as SIGTERM",
}
