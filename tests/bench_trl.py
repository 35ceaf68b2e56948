"""Time TRL's DPOTrainer as bench.py times train.py. Needs trl, and peft for --lora_r.

    python bench.py --compare "python tests/bench_trl.py" ...

Prints one JSON line. The reference runs in each step and the optimizer is fused AdamW, as in
train.py. TRL computes logits for the tokens of answers alone on a GPU, and for all tokens on a CPU;
here it always does the former, which is faster.
"""
import argparse
import json
import os
import resource
import tempfile
import time

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp()}
import datasets
import numpy as np
import torch
import transformers
import trl
import trl.trainer.utils

NUMBERS = ("batch_size", "steps", "warmup", "max_length", "lora_r", "threads")
SWITCHES = ("bf16", "gc", "precompute_ref", "no_shuffle")


class Marks(transformers.TrainerCallback):
    """The time at the end of each step, and the losses."""

    def __init__(self):
        self.times, self.losses = [], []

    def on_step_end(self, args, state, control, **more):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **more):
        if "loss" in logs:
            self.losses.append(logs["loss"])


class CountingCollator:
    """A data collator that counts the tokens of each batch: with every prompt twice, with every
    prompt once, and with padding."""

    def __init__(self, collate):
        self.collate, self.counts = collate, []

    def __call__(self, examples):
        batch = self.collate(examples)
        tokens = int(batch["attention_mask"].sum())
        answers = int(batch["completion_mask"].sum())
        unique = (tokens - answers) // 2 + answers  # each prompt is in two rows
        self.counts.append((tokens, unique, batch["attention_mask"].numel()))
        return batch


def peak_rss():
    """MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def parse_args():
    parser = argparse.ArgumentParser()
    for name in ("model", "data"):
        parser.add_argument(f"--{name}", required=True)
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def read_rows(args):
    rows = []
    with open(args.data) as file:
        for line in file:
            row = json.loads(line)
            rows.append({side: row[side] for side in ("prompt", "chosen", "rejected")})
    return datasets.Dataset.from_list(rows[:args.batch_size * args.steps])


def make_config(args):
    return trl.DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        max_length=args.max_length,
        beta=0.1,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        bf16=args.bf16,
        gradient_checkpointing=args.gc,
        precompute_ref_log_probs=args.precompute_ref,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential" if args.no_shuffle else "random",
    )


def make_lora(args):
    if not args.lora_r:
        return None
    import peft
    return peft.LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear",
                           task_type="CAUSAL_LM")


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    # TRL asks this only to choose at which positions it computes logits.
    trl.trainer.utils._use_triton = lambda device: True
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    rows, config, lora = read_rows(args), make_config(args), make_lora(args)

    # Model and trainer.
    began, marks = time.perf_counter(), Marks()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer,
        peft_config=lora, callbacks=[marks])
    collator = CountingCollator(trainer.data_collator)
    trainer.data_collator = collator

    # Training, and the steps after the warmup.
    start, before = time.perf_counter(), peak_rss()
    trainer.train()
    steps = np.diff([start, *marks.times])[args.warmup:]
    tokens, unique, padded = np.array(collator.counts[args.warmup:args.steps]).sum(0)
    peak_gpu = None
    if torch.cuda.is_available():
        peak_gpu = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps({
        "impl": f"trl-{trl.__version__}",
        "torch": torch.__version__,
        "step_s_median": np.median(steps),
        "step_s_mean": steps.mean(),
        "pairs_per_s": args.batch_size / steps.mean(),
        "nonpad_tokens_per_s": tokens / steps.sum(),
        "unique_tokens_per_s": unique / steps.sum(),
        "padding_fraction": 1 - tokens / padded,
        "init_s": start - began,
        "rss_before_train_mb": before,
        "peak_rss_mb": peak_rss(),
        "peak_gpu_mb": peak_gpu,
        "first_loss": marks.losses[0],
        "last_loss": marks.losses[-1],
    }))


if __name__ == "__main__":
    main()
