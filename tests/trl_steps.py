"""Train by TRL on the rows and from the adapter of real_model.py, and print a JSON line per step.

    python real_model.py ... --compare "python tests/trl_steps.py"

Needs trl and peft. The rows are texts, so TRL tokenizes them itself; other token ids than those of
this project are an error. Differences of TRL that are known and are no difference of the loss are
removed here:
- Each answer of KTO gets the mismatched answer that real_model.py names. TRL's own is that of the
  row before, in a batch.
- ORPO's likelihood term is the mean over the answers' tokens. TRL's own counts the prompt too.
"""
import argparse
import contextlib
import importlib
import json
import os
import sys
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp()}
import datasets
import peft
import torch
import transformers
from safetensors.torch import load_file

TRAINERS = {
    "sft": ("trl", "SFTTrainer", "SFTConfig"),
    "sigmoid": ("trl", "DPOTrainer", "DPOConfig"),
    "ipo": ("trl", "DPOTrainer", "DPOConfig"),
    "kto": ("trl", "KTOTrainer", "KTOConfig"),
    "simpo": ("trl.experimental.cpo", "CPOTrainer", "CPOConfig"),
    "orpo": ("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig"),
}


def make_config(config_class, job):
    """The configuration of a trainer. `job` is what real_model.py wrote for us."""
    settings = dict(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=job["batch_size"],
        max_steps=job["steps"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_length=job["max_length"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )
    loss, hyper = job["loss"], job["hyper"]
    if loss in ("sigmoid", "ipo", "kto", "simpo"):
        settings["loss_type"] = loss
    if loss == "simpo":
        settings |= {"simpo_gamma": hyper["gamma"], "cpo_alpha": 0.0}
    if "beta" in hyper:
        settings["beta"] = hyper["beta"]
    if loss == "sft":
        settings["completion_only_loss"] = True
    return config_class(**settings)


def dataset_of(loss, rows):
    """The rows as this trainer reads them."""
    if loss == "sft":
        columns = [{"prompt": row["prompt"], "completion": row["answers"][0]} for row in rows]
    elif loss == "kto":
        columns = [{"prompt": row["prompt"], "completion": row["answers"][0],
                    "label": row["desirable"]} for row in rows]
    else:
        columns = [{"prompt": row["prompt"], "chosen": row["answers"][0],
                    "rejected": row["answers"][1]} for row in rows]
    return datasets.Dataset.from_list(columns)


def token_ids(loss, row):
    """The ids of prompt with answer, one list for each answer, in a row of TRL's data set."""
    if loss == "sft":
        return [row["input_ids"]]
    if loss == "kto":
        return [row["prompt_ids"] + row["completion_ids"]]
    if loss in ("simpo", "orpo"):
        return [row["chosen_input_ids"], row["rejected_input_ids"]]
    return [row["prompt_ids"] + row["chosen_ids"], row["prompt_ids"] + row["rejected_ids"]]


def check_ids(loss, trl_rows, rows):
    for number, (trl_row, row) in enumerate(zip(trl_rows, rows, strict=True), 1):
        expected = [row["prompt_ids"] + ids for ids in row["answer_ids"]]
        if token_ids(loss, trl_row) != expected:
            sys.exit(f"row {number}: TRL has other token ids: {token_ids(loss, trl_row)} and not "
                     f"{expected}")


def answers_only(trainer_class):
    """ORPO with the mean log-prob of the answers' tokens as its likelihood term."""
    class OrpoOfAnswers(trainer_class):
        def concatenated_forward(self, model, batch):
            outputs = super().concatenated_forward(model, batch)
            averages = outputs[0]  # of the chosen answers, per token
            lengths = (batch["chosen_labels"][:, 1:] != -100).sum(1)
            likelihood = (averages * lengths).sum() / lengths.sum()
            return (*outputs[:4], -likelihood, *outputs[5:])
    return OrpoOfAnswers


def make_trainer(job, rows):
    loss = job["loss"]
    module, trainer_name, config_name = TRAINERS[loss]
    module = importlib.import_module(module)
    trainer_class = getattr(module, trainer_name)
    if loss == "orpo":
        trainer_class = answers_only(trainer_class)

    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    settings = peft.LoraConfig.from_pretrained(job["adapter"])
    settings.inference_mode = False
    trainer = trainer_class(
        model=model,
        args=make_config(getattr(module, config_name), job),
        train_dataset=dataset_of(loss, rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
        peft_config=settings,
    )
    check_ids(loss, trainer.train_dataset, rows)
    if loss == "kto":
        mismatched = [row["mismatched_ids"] for row in rows]
        others = trainer.train_dataset.remove_columns("KL_completion_ids")
        trainer.train_dataset = others.add_column("KL_completion_ids", mismatched)

    # The same A and B at the start.
    tensors = load_file(os.path.join(job["adapter"], "adapter_model.safetensors"))
    result = peft.set_peft_model_state_dict(trainer.model, tensors)
    if result.unexpected_keys:
        sys.exit(f"the adapter does not fit: {result.unexpected_keys}")
    sequential = torch.utils.data.SequentialSampler
    trainer._get_train_sampler = lambda *args: sequential(trainer.train_dataset)
    return trainer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("job", help="a JSON file that real_model.py wrote")
    with open(parser.parse_args().job) as file:
        job = json.load(file)
    with open(job["rows"]) as file:
        rows = [json.loads(line) for line in file]

    with contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(job, rows)
        trainer.train()
    versions = {"trl": importlib.import_module("trl").__version__, "peft": peft.__version__}
    for line in trainer.state.log_history:
        if "loss" in line:
            print(json.dumps(line | versions))


if __name__ == "__main__":
    main()
