"""Time TRL's DPOTrainer as bench.py times train.py, for `python bench.py --compare "python tests/bench_trl.py"`: needs trl, and peft for --lora_r.

Prints one JSON line. The reference runs in each step and the optimizer is fused AdamW, as in train.py. TRL scores the tokens of answers alone
on a GPU and all tokens on a CPU; here it always does the former, which is the faster.
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

SWITCHES, NUMBERS = ("bf16", "gc", "precompute_ref", "no_shuffle"), ("batch_size", "steps", "warmup", "max_length", "lora_r", "threads")


class Marks(transformers.TrainerCallback):
    def __init__(self):
        self.times, self.losses = [], []

    def on_step_end(self, args, state, control, **more):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **more):
        self.losses += [logs["loss"]] if "loss" in logs else []


def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


parser = argparse.ArgumentParser()
for name in ("model", "data"):
    parser.add_argument(f"--{name}", required=True)
for name in NUMBERS:
    parser.add_argument(f"--{name}", type=int, required=True)
for name in SWITCHES:
    parser.add_argument(f"--{name}", action="store_true")
args = parser.parse_args()
torch.set_num_threads(args.threads)
trl.trainer.utils._use_triton = lambda device: True  # the question is only asked to choose which positions are scored
tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
rows = [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in map(json.loads, open(args.data))][:args.batch_size * args.steps]
lora = None
if args.lora_r:
    import peft
    lora = peft.LoraConfig(r=args.lora_r, lora_alpha=2 * args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
config = trl.DPOConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=args.batch_size, max_steps=args.steps, max_length=args.max_length, beta=0.1,
    learning_rate=1e-6, lr_scheduler_type="constant", bf16=args.bf16, gradient_checkpointing=args.gc, precompute_ref_log_probs=args.precompute_ref,
    logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    train_sampling_strategy="sequential" if args.no_shuffle else "random")
began, marks, counts = time.perf_counter(), Marks(), []
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
trainer = trl.DPOTrainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora,
                         callbacks=[marks])
collate = trainer.data_collator


def counted(examples):
    batch = collate(examples)
    tokens, answers = int(batch["attention_mask"].sum()), int(batch["completion_mask"].sum())
    counts.append((tokens, (tokens - answers) // 2 + answers, batch["attention_mask"].numel()))  # each prompt stands in two rows
    return batch


trainer.data_collator = counted
start, before = time.perf_counter(), memory()
trainer.train()
steps = np.diff([start, *marks.times])[args.warmup:]
tokens, unique, padded = np.array(counts[args.warmup:args.steps]).sum(0)
print(json.dumps({
    "impl": f"trl-{trl.__version__}", "torch": torch.__version__, "step_s_median": np.median(steps), "step_s_mean": steps.mean(),
    "pairs_per_s": args.batch_size / steps.mean(), "nonpad_tokens_per_s": tokens / steps.sum(), "unique_tokens_per_s": unique / steps.sum(),
    "padding_fraction": 1 - tokens / padded, "init_s": start - began, "rss_before_train_mb": before, "peak_rss_mb": memory(),
    "peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
    "first_loss": marks.losses[0], "last_loss": marks.losses[-1]}))
