"""Says which key of ours other programs' usual name for it means: `lr` is `optimizer.learning_rate`."""

USUAL_WORDS: dict[tuple[str, ...], str] = {
    ("train.global_batch_size", "train.micro_batch_size"): """
        batch batch_size bs accum_steps grad_accum gradient_accumulation gradient_accumulation_steps
        accumulate_grad_batches""",
    ("train.global_batch_size",): "total_batch_size train_batch_size global_batch",
    ("train.micro_batch_size",): """
        batch_size_per_gpu batch_per_gpu batch_gpu microbatch microbatch_size per_device_train_batch_size
        per_device_batch_size train_micro_batch_size_per_gpu""",
    ("train.total_steps",): """
        epochs num_epochs num_train_epochs max_epochs steps num_steps max_steps train_steps max_train_steps
        num_train_steps total_training_steps iterations iters num_iterations max_iterations max_iters
        lr_anneal_steps""",
    ("train.log_every",): "log_interval log_steps logging_steps log_freq",
    ("train.sample_every",): "sample_interval sample_steps",
    ("train.seed",): "random_seed manual_seed",
    ("train.init_from",): "pretrained pretrained_model init_checkpoint",
    ("checkpoint.every_steps",): """
        save_every save_interval save_steps save_freq ckpt_every checkpoint_every checkpoint_interval
        checkpointing_steps checkpoint.every""",
    ("optimizer.learning_rate",): "lr base_lr max_lr peak_lr",
    ("optimizer.weight_decay",): "wd",
    ("optimizer.betas",): "beta1 beta2 adam_beta1 adam_beta2",
    ("optimizer.eps",): "epsilon adam_epsilon",
    ("optimizer.kind",): "optimizer.name optimizer.type",
    ("optimizer.warmup_steps",): "lr_warmup warmup_ratio",
    ("optimizer.schedule",): "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    ("engine.precision",): "mixed_precision amp use_amp autocast dtype torch_dtype",
    ("engine.precision=fp16",): "fp16 use_fp16",
    ("engine.precision=bf16",): "bf16 use_bf16",
    ("engine.gradient_clip",): "clip_grad grad_clip_norm gradient_clipping clip_grad_norm max_grad_norm",
    ("engine.zero_stage",): "stage deepspeed_stage",
    ("model.image_size",): "resolution res img_size",
    ("model.channels",): "model_channels base_channels",
    ("model.head_channels",): "num_heads num_head_channels attention_head_dim",
    ("model.activation_checkpointing",): "gradient_checkpointing grad_checkpoint use_checkpoint",
    ("data.path",): "data_dir data_path dataset_path dataset_dir data_root data.dir data.root train_data_dir",
    ("data.workers",): "num_workers dataloader_num_workers loader_workers",
    ("data.flip",): "random_flip horizontal_flip xflip mirror",
    ("ema.rates",): "ema_rate ema_decay ema_beta ema.decay ema.beta",
    ("method.distance",): "loss_norm loss_type",
    ("slurm.gpus_per_node",): "gpus num_gpus ngpus",
    ("slurm.nodes",): "num_nodes nnodes",
    ("slurm.time",): "time_limit walltime",
    ("wandb.mode",): "use_wandb",
    ("--runs-dir of launchers/submit.py",): "output_dir out_dir outdir log_dir logdir save_dir runs_dir",
    ("--name of launchers/submit.py",): "run_name exp_name experiment_name",
    ("--resume RUN of launchers/submit.py",): "resume resume_from resume_checkpoint resume_from_checkpoint",
    ("--steps of launchers/evaluate.py",): "evaluate.steps evaluate.num_steps sampling.steps sampling.num_steps",
    ("--evaluate-every of launchers/submit.py",): """
        eval_every eval_interval eval_steps eval_freq evaluate_every evaluate.every evaluate.every_steps""",
}
"""What is meant -> how other programs call it: the last part of a key, or a whole key."""
_MEANT = {word: meant for meant, words in USUAL_WORDS.items() for word in words.split()}


def meant_by(key: str) -> tuple[str, ...]:
    """What an unknown key means if its name is usual elsewhere: keys, key=value, or an option; else empty."""
    whole = key.lower().replace("-", "_")
    return _MEANT.get(whole) or _MEANT.get(whole.rpartition(".")[2], ())
