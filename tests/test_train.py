"""The run: what it computes does not depend on how it is cut into pieces, and it can be stopped and spoiled without loss."""
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import (
    ALONE,
    ROOT,
    SHARED,
    command,
    launch,
    make_rows,
    read_metrics,
    same_metrics,
    tiny_model,
    unfinished,
    wait_for_checkpoint,
    weights,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import batches
import checkpoint
import data
import model as models
import reference as references
import train
from dpo import SequenceLogps, concatenated_forward
from losses import find, hyperparameters


def run(arguments, **options):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **options)


# --- one optimizer step is one function of its pairs

@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "sft", "orpo", "sigmoid:0.8,bco_pair:0.2,sft:1"])
def test_accumulation_gives_the_gradient_of_the_whole_batch_also_on_the_short_last_window(fit, monkeypatch, loss):
    """22 rows in windows of 8, 8 and 6; plain gradient descent, so that the weights are the start minus the gradients."""
    monkeypatch.setattr(train, "make_optimizer", lambda model, lr, device: torch.optim.SGD(model.parameters(), lr=lr))
    results = {}
    for micro in (8, 4, 2, 3):
        out, metrics = fit(loss=loss, beta=0.1 if "beta" in hyperparameters(find(loss)) else None, micro_batch_size=micro, dtype="float64", eval_share=0, max_grad_norm=1e9, lr=1e-3,
                           lr_schedule="constant", warmup_steps=0, out=f"micro{micro}")
        results[micro] = weights(out), metrics
    for micro in (4, 2, 3):
        for name, value in results[8][0].items():
            assert torch.allclose(value, results[micro][0][name], rtol=1e-12, atol=1e-12), name
        same_metrics(results[8][1], results[micro][1], 1e-9)
    assert len(results[8][1]) == 3


def test_the_gradient_is_that_of_the_mean_loss_over_the_pairs(fit, folder, pairs, monkeypatch):
    """One step of plain gradient descent, against autograd on full logits and nothing of the loop."""
    monkeypatch.setattr(train, "make_optimizer", lambda model, lr, device: torch.optim.SGD(model.parameters(), lr=lr))
    out, metrics = fit(max_steps=1, batch_size=22, shuffle="false", dtype="float64", eval_share=0, max_grad_norm=1e9, lr=0.1,
                       lr_schedule="constant", warmup_steps=0, beta=0.5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def logp(prompt, answer):
        prompt, answer = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(table[len(prompt) - 1 + i, token] for i, token in enumerate(answer))

    loss = 0
    for row in map(json.loads, open(pairs)):
        h = logp(row["prompt"], row["chosen"]) - logp(row["prompt"], row["rejected"])
        loss = loss - torch.nn.functional.logsigmoid(0.5 * (h - h.detach())) / 22  # at the start the reference is the policy
    loss.backward()
    assert metrics[0]["loss"] == pytest.approx(loss.item(), abs=1e-9)
    saved = weights(out)
    for name, parameter in model.named_parameters():
        assert torch.allclose(saved[name], start[name] - 0.1 * parameter.grad, atol=1e-7), name


def test_two_processes_end_like_one_at_the_same_global_batch(fit, folder, pairs, tmp_path):
    """20 rows in windows of 8, 8 and 4, held-out rows of any number, micro-batches of 3: nothing divides evenly."""
    flags = dict(model=folder, dataset=pairs, output_dir=tmp_path / "two", batch_size=7, micro_batch_size=2, max_length=64, lr=1e-2,
                 eval_share=0.1, log_every=1, dtype="float64", epochs=3)
    result = run(command(*(f"--{k}={v}" for k, v in flags.items()), torchrun=2))
    out, metrics = fit(**flags | {"output_dir": tmp_path / "one"}, out="one")
    assert (tmp_path / "two" / "metrics.jsonl").exists(), result.stderr
    same_metrics(metrics, read_metrics(tmp_path / "two"), 1e-6)
    two = weights(tmp_path / "two")
    assert all(torch.allclose(value, two[name], atol=1e-6) for name, value in weights(tmp_path / "one").items())


def test_more_processes_than_pairs_in_the_last_window_and_among_the_held_out(fit, folder, tmp_path):
    """5 rows in windows of 4 and 1, and 1 held out: where the second process has none, it weighs nothing."""
    rows, held_out = (write_jsonl(tmp_path / f"{count}.jsonl", make_rows(count)) for count in (5, 1))
    flags = dict(model=folder, dataset=rows, eval_dataset=held_out, batch_size=4, micro_batch_size=2, max_length=64, lr=1e-2,
                 log_every=1, dtype="float64")
    result = run(command(*(f"--{k}={v}" for k, v in flags.items()), f"--output_dir={tmp_path / 'two'}", torchrun=2))
    _, metrics = fit(**flags, eval_share=None, out="one")
    assert (tmp_path / "two" / "metrics.jsonl").exists(), result.stderr
    same_metrics(metrics, read_metrics(tmp_path / "two"), 1e-6)


def test_odpo_reads_the_scores_of_the_file(fit, tmp_path):
    rows = [row | {"chosen_score": i + 2.0, "rejected_score": 1.0} for i, row in enumerate(make_rows(8))]
    _, metrics = fit(loss="odpo", dataset=write_jsonl(tmp_path / "scored.jsonl", rows), max_steps=1, eval_share=0, odpo_alpha=0.5)
    expected = sum(math.log1p(math.exp(0.5 * math.log(i + 1))) for i in range(8)) / 8
    assert metrics[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_reference_free_run_loads_no_reference_and_a_sum_names_its_folder(fit, monkeypatch, tmp_path, folder, pairs):
    loaded = []
    monkeypatch.setattr(references, "load_model", lambda *given: loaded.append(given) or models.load_model(*given))
    monkeypatch.chdir(tmp_path)
    train.main([f"--model={folder}", f"--dataset={pairs}", "--loss=sigmoid:0.5,sft", "--reference_free", "--max_length=64", "--max_steps=1"], ALONE)
    assert len(loaded) == 1 and (tmp_path / "runs" / "sigmoid+0.5+sft" / "model.safetensors").exists()


def test_a_run_on_messages_under_other_names_reports_them_first_and_keeps_the_template(fit, tmp_path, capsys):
    def turn(role, content):
        return {"role": role, "content": content}

    rows = [{"q": [turn("user", row["prompt"])], "a": [turn("assistant", row["chosen"])], "b": row["rejected"]} for row in make_rows(12)]
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}")
    out, _ = fit(dataset=write_jsonl(tmp_path / "chat.jsonl", rows), columns="prompt=q,chosen=a,rejected=b", chat_template=template,
                 max_steps=1, eval_share=None, eval_dataset=tmp_path / "chat.jsonl")
    said = capsys.readouterr().out
    assert "12 of 12 rows kept" in said and "12 prompts are both trained and held out" in said and "tokens an epoch, each prompt once" in said
    assert "\\nassistant:'" in said and "chosen   [" in said
    assert AutoTokenizer.from_pretrained(out).chat_template == template.read_text()


def test_training_raises_the_margin_and_the_folder_it_leaves_generates(fit):
    out, metrics = fit(epochs=8)
    trained = [row for row in metrics if row["split"] == "train"]
    assert trained[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and trained[-1]["rewards/margins"] > 1
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = model.generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=5)
    assert ids.shape[1] > len(tokenizer("the cat")["input_ids"])


def test_config_json_holds_every_resolved_flag_and_every_logged_step_its_metrics(fit, tmp_path):
    out, metrics = fit(max_steps=4)
    flags = json.loads((out / "config.json").read_text())["flags"]
    assert flags["beta"] == 0.1 and flags["warmup_steps"] == 0 and flags["loss"] == "sigmoid" and flags["epochs"] is None
    assert set(vars(train.parse_args([])[0])) == set(flags) and flags["attention"] in ("packed", "padded") and flags["output_dir"] == str(out)
    wanted = {"step", "split", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
              "logps/rejected", "grad_norm", "lr", "tokens_per_second"}
    assert all(wanted <= set(row) for row in metrics if row["split"] == "train") and metrics[-1]["split"] == "eval"


def test_bfloat16_trains_and_leaves_float32_weights(fit):
    out, metrics = fit(epochs=8, dtype="bfloat16")
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-4) and metrics[-2]["rewards/margins"] > 1
    assert {value.dtype for value in weights(out).values()} == {torch.float32}


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for: .item() and the like, and copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, given=(), named=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*given, **named or {})


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "kto_pair"])
def test_one_step_alone_is_an_update_by_the_mean_loss_and_reads_no_single_number(loss, folder, tokenizer):
    """7 pairs in pieces of 3, 3 and 1, in float64 and by gradient descent, against autograd on all of them at once."""
    policy, reference = (SequenceLogps(models.load_model(folder, torch.float64)) for _ in range(2))
    policy.model.lm_head.weight.data.mul_(1.1)  # else every log-ratio is 0
    task = train.Task(find(loss), {}, {}, {}, "float64", torch.device("cpu"), packed=True)
    ids = [{name: tokenizer(row[name])["input_ids"] for name in ("prompt", "chosen", "rejected")} for row in make_rows(7)]
    columns = {"id": list("abcdefg")} | {f"{name}_ids": [row[name] for row in ids] for name in ids[0]}
    pieces = [train.Piece(slice(i, min(i + 3, 7)), 1.0) for i in (0, 3, 6)]
    batches = [train.collate({name: values[piece.places] for name, values in columns.items()}, tokenizer, ALONE.device, True) for piece in pieces]
    losses, metrics = train.preference_step(policy, reference, train.collate(columns, tokenizer, ALONE.device), find(loss), {})
    parameters = dict(policy.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(losses.mean(), list(parameters.values()))))
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer, stream = torch.optim.SGD(policy.parameters(), lr=0.1), iter(batches * 2)  # twice: for a loss that compares pairs
    with Waits() as waits:
        values = train.train_step(task, policy, reference, optimizer, stream, train.Step(1, 7, pieces, {}), 1e9, False, ALONE)
    assert waits.count == 0
    assert len(list(stream)) == (3 if loss == "sigmoid" else 0)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter, start[name] - 0.1 * gradients[name], rtol=0, atol=1e-7), name  # a Llama's norms are in float32
    assert values["grad_norm"] == pytest.approx(sum(g.square().sum() for g in gradients.values()).sqrt().item(), rel=1e-5)
    assert values["stop"] == 0 and all(values[name] == pytest.approx(value.mean().item(), rel=1e-5, abs=1e-5) for name, value in metrics.items())


# --- the next micro-batch is made while this one is computed

def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_one_ahead_keeps_the_order_and_works_on_the_next_one_only():
    made, seen = [], []
    for value in batches.one_ahead(iter(range(6)), lambda job: made.append(job) or 10 * job, threaded=True):
        seen.append(value)
        time.sleep(0.01)
        assert len(made) == min(6, len(seen) + 1)
    assert seen == [0, 10, 20, 30, 40, 50] == list(batches.one_ahead(range(6), lambda job: 10 * job, threaded=False))
    assert list(batches.one_ahead([], str, threaded=True)) == [] and not threads()


def test_an_error_in_the_thread_is_raised_with_its_traceback_and_the_thread_ends():
    def fails_at_two(job):
        return 1 / (2 - job)

    found = []
    with pytest.raises(ZeroDivisionError) as error:
        for value in batches.one_ahead(range(5), fails_at_two, threaded=True):
            found.append(value)
    assert found == [0.5, 1.0] and error.traceback[-1].name == "fails_at_two" and not threads()


def test_a_run_with_the_thread_is_the_same_bit_for_bit_and_leaves_no_thread_after_its_end_an_error_or_a_signal(fit, monkeypatch, tmp_path):
    plain = [fit(loss=loss, out=f"plain-{loss}", sync_ref_every=2, save_every=2) for loss in ("sigmoid", "aot")]
    inner, started = batches.one_ahead, []
    monkeypatch.setattr(batches, "one_ahead", lambda jobs, make, threaded: started.append(1) or inner(jobs, make, True))
    for loss, (folder, metrics) in zip(("sigmoid", "aot"), plain):
        out, again = fit(loss=loss, out=f"thread-{loss}", sync_ref_every=2, save_every=2)
        same_metrics(metrics, again, 0)
        assert all(torch.equal(value, weights(out)[name]) for name, value in weights(folder).items())
        assert started and not threads()
    step, calls = train.train_step, []

    def interrupted(*given):
        calls.append(len(threads()))
        if len(calls) == 1:  # a second one would end the process
            os.kill(os.getpid(), signal.SIGINT)
        return step(*given)

    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(AssertionError):  # of `fit`, which expects a run to end
        fit(out="signal")
    assert calls == [0, 1] and not threads() and (tmp_path / "signal" / "checkpoint-2").exists()
    monkeypatch.setattr(train, "train_step", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(out="error")
    assert not threads()


# --- deterministic kernels

def test_deterministic_sets_torch_and_cublas_and_changes_no_number_on_a_cpu(fit, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    _, plain = fit(max_steps=3, out="plain")
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    inside, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *given: inside.append(
        (torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))) or step(*given))
    _, metrics = fit("--deterministic", max_steps=3)
    assert inside == [(True, ":4096:8")] * 3
    same_metrics(plain, metrics, 0)
    fit(max_steps=1, out="off")
    assert not torch.are_deterministic_algorithms_enabled()


# --- the check before the first step

@pytest.mark.parametrize("loss, value", [("sigmoid", 0.6931), ("hinge", 1.0), ("ipo", 25.0)])
def test_the_loss_of_real_rows_before_the_first_step_is_its_value_at_zero_margin(fit, capsys, loss, value):
    fit(loss=loss, max_steps=1)
    assert f"step-0 check: the loss is {value:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("cause", ["dropout", "dtype", "weights"])
def test_the_step_0_check_stops_a_reference_that_is_not_the_policy(fit, monkeypatch, tokenizer, tmp_path, cause):
    models.save_model(tiny_model("gpt2", tokenizer), tokenizer, tmp_path / "gpt2")
    load, calls = references.load_model, []

    def spoiled(*arguments):
        model = load(*arguments)
        calls.append(model)
        if cause == "dropout":
            model.transformer.drop.p = 0.3
        elif cause == "dtype" and len(calls) == 2:
            model.to(torch.bfloat16)
        elif cause == "weights" and len(calls) == 2:
            model.transformer.wte.weight.data[5:].mul_(1.1)
        return model

    monkeypatch.setattr(references, "load_model", spoiled)
    with pytest.raises(ValueError, match="policy and reference are equal. So they are not: look for another dtype"):
        fit(model=tmp_path / "gpt2", max_steps=1)


def test_the_step_0_check_is_skipped_with_a_line_when_the_reference_differs_on_purpose(fit, tokenizer, tmp_path, capsys):
    other = tiny_model("llama", tokenizer)
    other.lm_head.weight.data.mul_(2)
    models.save_model(other, tokenizer, tmp_path / "other")
    _, metrics = fit(max_steps=1, ref_model=tmp_path / "other")
    assert "no step-0 check: --ref_model" in capsys.readouterr().out and metrics[0]["rewards/margins"] != 0


@pytest.mark.parametrize("dtype, shift, stops", [("bfloat16", 0.8, False), ("bfloat16", 4.0, True), ("float32", 4e-3, True), ("float32", 1e-4, False)])
def test_a_cached_reference_may_differ_by_rounding_in_nats_per_root_of_tokens_and_by_no_more(fit, tmp_path, monkeypatch, dtype, shift, stops):
    """A bound that grows with the log-prob would let 0.004 nats of 60 pass in float32, and stop 0.8 nats of 60 in bfloat16."""
    monkeypatch.chdir(tmp_path)
    rows = [row | {"chosen": " cat sat on a mat and saw one dog", "rejected": " dog ran far from home in rain or sun"} for row in make_rows(12)]
    flags = dict(dataset=write_jsonl(tmp_path / "long.jsonl", rows), eval_share=0, ref="cache", max_steps=1, dtype=dtype, lr=1e-9)
    fit(**flags)
    path, = (tmp_path / "runs" / "references").iterdir()
    tables = load_file(path)
    assert 30 < tables["train"].abs().min() and tables["train"].abs().max() < 100
    save_file(tables | {"train": tables["train"] + shift}, path)
    if stops:
        with pytest.raises(ValueError, match="has other log-probs than the reference gives now for row"):
            fit(**flags, out="again")
    else:
        fit(**flags, out="again")


@pytest.mark.slow
@pytest.mark.skipif("REAL_MODEL" not in os.environ or not SHARED.exists(), reason="REAL_MODEL names no folder")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_real_model_rounding_stays_well_below_its_bound(dtype):
    """Log-probs of 8 real pairs in batches of 1, 4 and 8, padded and packed."""
    folder = os.environ["REAL_MODEL"]
    tokenizer, module = models.load_tokenizer(folder), SequenceLogps(models.load_model(folder))
    rows = data.load_tokens(str(SHARED / "data" / "hh_harmless_512.jsonl"), tokenizer, ("chosen", "rejected"), data.Limits(1024))[0]
    rows = rows.select([i for i, tokens in enumerate(data.column(rows, "tokens")) if tokens < 300][:8])
    found = []
    for packed in (False, True):
        for size in (1, 4, 8):
            with torch.no_grad(), train.autocast(dtype, ALONE.device):
                parts = [concatenated_forward(module, train.collate(rows[i:i + size], tokenizer, ALONE.device, packed)) for i in range(0, 8, size)]
            found.append(torch.stack([torch.cat([part[f"{side}_logps"] for part in parts]) for side in ("chosen", "rejected")], 1).double())
    spread = torch.stack(found).amax(0) - torch.stack(found).amin(0)
    assert 0 < (spread / references.rounding(dtype, references.answer_lengths(rows), ALONE.device)).max() < 0.5


def test_a_policy_without_a_trainable_parameter_is_refused(fit, monkeypatch):
    load = references.load_model
    monkeypatch.setattr(references, "load_model", lambda *arguments: load(*arguments).requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit(max_steps=1)


# --- stop and go on

LONG = dict(epochs=40, save_every=5, eval_every=30)  # 120 steps


@pytest.fixture
def uninterrupted(fit):
    return fit(**LONG, out="whole")


def check_resumed(out, uninterrupted):
    assert not (out / "model.safetensors").exists()  # it was stopped before its end
    with open(out / "metrics.jsonl", "a") as file:  # a step after the checkpoint, and a row torn by the kill
        file.write('{"step": 119, "split": "train", "loss": 0}\n{"step": 12')
    assert train.main(["--output_dir", str(out), "--resume"], ALONE) is False
    whole, metrics = uninterrupted
    resumed = weights(out)
    assert all(torch.equal(value, resumed[name]) for name, value in weights(whole).items())
    same_metrics(metrics, read_metrics(out), 0)


def test_the_running_shift_of_bco_goes_on_where_it_stopped(fit, tmp_path):
    """δ follows ½ (mean r_w + mean r_l) of the steps before, by eq. 7's moving average, and a checkpoint holds it."""
    _, whole = fit(loss="bco_pair", max_steps=6, out="whole")
    delta = 0.0
    for row in (row for row in whole if row["split"] == "train"):
        assert row["delta"] == pytest.approx(delta, abs=1e-12)
        delta = 0.9 * delta + 0.05 * (row["rewards/chosen"] + row["rewards/rejected"])
    assert delta != 0
    out, _ = fit(loss="bco_pair", max_steps=6, save_every=3, out="half")
    unfinished(out)
    train.main(["--output_dir", str(out), "--resume"], ALONE)
    same_metrics(whole, read_metrics(out), 0)


def test_a_killed_run_that_is_resumed_ends_bit_for_bit_like_one_that_was_not(folder, pairs, tmp_path, uninterrupted):
    process = launch(folder, pairs, tmp_path / "killed", **LONG)
    wait_for_checkpoint(process, tmp_path / "killed")
    process.kill()
    process.wait()
    check_resumed(tmp_path / "killed", uninterrupted)


@pytest.mark.parametrize("torchrun", [0, 2])
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(folder, pairs, tmp_path, uninterrupted, torchrun):
    out = tmp_path / "stopped"
    process = launch(folder, pairs, out, torchrun, **LONG)
    wait_for_checkpoint(process, out)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert f"python train.py --output_dir {out} --resume" in stdout and "Traceback" not in (stdout if torchrun else stdout + stderr)
    if not torchrun:  # with two processes the sums are in another order
        assert process.returncode == 130
        check_resumed(out, uninterrupted)


def test_only_the_last_checkpoints_are_kept_and_each_is_whole(uninterrupted):
    out, _ = uninterrupted
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-110", "checkpoint-115"]
    assert all((path / "state.json").exists() and weights(path) for path in out.glob("checkpoint-*"))
    assert not [path for path in out.rglob("*") if path.name.startswith(".") and path.name != ".lock" or path.suffix == ".tmp"]


def test_a_half_written_checkpoint_is_not_mistaken_for_one(fit, tmp_path):
    """What a kill while saving leaves: the folder written aside, and no more."""
    fit(max_steps=4, save_every=2)
    (tmp_path / "out" / ".checkpoint").mkdir()
    (tmp_path / "out" / ".checkpoint" / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_a_complete_run_resumes_to_nothing_and_is_not_overwritten(fit, capsys):
    out, _ = fit(max_steps=2)
    before = weights(out)
    train.main(["--output_dir", str(out), "--resume"], ALONE)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run already"):
        fit(max_steps=2)
    assert all(torch.equal(value, before[name]) for name, value in weights(out).items())


def test_a_resumed_run_may_not_change_what_it_computes(fit, tmp_path):
    out, _ = fit(max_steps=4, save_every=2)
    unfinished(out)
    for flag, name in (("--beta=0.2", "beta"), ("--loss=ipo", "loss"), ("--lr=0.5", "lr"), ("--max_steps=9", "max_steps")):
        with pytest.raises(ValueError, match=f"--{name} .* may not change"):
            train.main(["--output_dir", str(out), "--resume", flag], ALONE)


def test_a_resumed_run_may_not_change_its_rows(fit, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(30))
    out, _ = fit(dataset=path, max_steps=4, save_every=2, eval_share=0)
    unfinished(out)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(20))
    with pytest.raises(ValueError, match="--resume: the data set is not the one that this run began with"):
        train.main(["--output_dir", str(out), "--resume"], ALONE)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="--resume needs the --output_dir"):
        train.parse_args(["--resume"])
    with pytest.raises(ValueError, match="there is no run in"):
        train.parse_args(["--resume", "--output_dir", str(tmp_path / "nothing")])


# --- bad input

@pytest.mark.parametrize("flags, message", [
    (["--loss", "sigmod"], "--loss sigmod: there is no such loss; the nearest name is sigmoid"),
    (["--loss", "hinge", "--label_smoothing", "0.1"], "--label_smoothing is not read by --loss hinge; it is read by sigmoid"),
    (["--loss", "sft", "--beta", "0.1"], "--beta is not read by --loss sft; it is read by"),
    (["--loss", "sft", "--ref_model", "x"], "--ref_model: --loss sft has no reference"),
    (["--loss", "sigmoid,sppo_hard", "--model", "m", "--dataset", "d"], "--beta must be given: it has different defaults in the parts"),
    (["--loss", "sigmoid:-1,sft"], "--loss sigmoid:-1,sft: the weight of sigmoid must be a number > 0, got '-1'"),
    (["--loss", "hinge,sft", "--gamma", "1"], "--gamma is not read by --loss hinge,sft; it is read by simpo, alphapo"),
    (["--loss", "simpo", "--reference_free"], "--reference_free: simpo has no reference as it is"),
    (["--loss", "nca_pair", "--f_divergence", "js"], "--f_divergence: nca_pair reads more than a margin"),
    (["--f_divergence", "js", "--f_alpha", "0.5"], "--f_alpha: is read by the f_divergence alpha alone, got js"),
    (["--loss", "sigmoid", "--reference_free", "--ref_model", "x"], "--ref_model x: is not read with --reference_free"),
    (["--lora_rank", "4", "--ref", "model", "--sync_ref_every", "1"], "--sync_ref_every 1: --ref model has no adapter to move"),
    (["--loss", "aot", "--wpo"], "--wpo: a weight belongs to a pair"),
    (["--loss", "sigmoid", "--ld_alpha", "2"], "--ld_alpha must be in [0, 1], got 2.0"),
    (["--betta", "0.1"], "--betta: there is no such flag; the nearest is --beta"),
    (["--bet", "0.1"], "--bet: there is no such flag; the nearest is --beta"),
    (["--beta", "0"], "--beta must be > 0 and finite, got 0.0"),
    (["--beta", "-1"], "--beta must be > 0 and finite, got -1.0"),
    (["--beta", "nan"], "--beta must be > 0 and finite, got nan"),
    (["--beta", "x"], "argument --beta: invalid float value: 'x'"),
    (["--label_smoothing", "0.5"], "--label_smoothing must be in [0, 0.5), got 0.5"),
    (["--lr", "0"], "argument --lr: must be > 0, got 0"),
    (["--lr", "nan"], "argument --lr: must be > 0, got nan"),
    (["--batch_size", "0"], "argument --batch_size: must be >= 1, got 0"),
    (["--epochs", "1", "--max_steps", "2"], "--epochs 1 and --max_steps 2 both say how long to train"),
    (["--model", "world", "--dataset", "rows.jsonl"], "--model world has only the words of its own data"),
    (["--max_prompt_length", "16"], "--max_prompt_length 16: leaves no tokens for an answer in --max_length 16"),
    (["--eval_share", "0.5"], "--eval_share 0.5: the held-out rows are the world's own"),
    (["--model", "m", "--dataset", "d", "--eval_share", "1"], "--eval_share 1.0: leaves nothing to train on"),
    (["--model", "m", "--dataset", "d", "--eval_share", "0.1", "--eval_dataset", "e"], "--eval_share 0.1: the held-out rows are e"),
    (["--shuffle", "maybe"], "argument --shuffle: must be true or false, got maybe"),
    (["--loss"], "argument --loss: expected one argument"),
    (["--columns", "prompt:q"], "--columns prompt:q: write OURS=THEIRS"),
    (["--chat_template", "/nowhere"], "--chat_template /nowhere: no such file"),
    (["--micro_batch_size", "2", "--tokens_per_micro_batch", "99"], "--micro_batch_size 2 and --tokens_per_micro_batch 99: give one"),
    (["--overlong", "squeeze"], "argument --overlong: invalid choice: 'squeeze'"),
])
def test_a_wrong_flag_is_named_with_what_is_right(flags, message):
    with pytest.raises(ValueError) as error:
        train.parse_args(flags)
    assert message in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ({"max_length": 129}, "--max_length 129: the model has 128 positions; pass 128 or less"),
    ({"model": "/nowhere"}, "/nowhere: no such model folder"),
    ({"dataset": "/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
    ({"eval_dataset": "/nowhere.jsonl", "eval_share": None}, "/nowhere.jsonl: no such file"),
    ({"eval_share": 0.9999}, "holds out all 22 rows"),
])
def test_what_cannot_be_trained_is_refused_before_anything_is_written(fit, tmp_path, flags, message):
    with pytest.raises(ValueError) as error:
        fit(**flags)
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(fit, tokenizer, tmp_path):
    small = tiny_model("llama", tokenizer)
    small.resize_token_embeddings(100)
    models.save_model(small, tokenizer, tmp_path / "small")
    with pytest.raises(ValueError, match=r"\d+ tokens in its tokenizer, 100 in its embedding"):
        fit(model=tmp_path / "small")


@pytest.mark.parametrize("loss", ["sigmoid", "sft"])
def test_nan_weights_stop_with_step_rows_and_log_probs_and_save_nothing(fit, tokenizer, tmp_path, loss):
    broken = tiny_model("llama", tokenizer)
    broken.model.norm.weight.data[0] = float("nan")
    models.save_model(broken, tokenizer, tmp_path / "nan")
    with pytest.raises(FloatingPointError, match=r"step [01]: the loss is nan(.|\n)*pairs.jsonl, row \d+: loss nan, logps/chosen nan"):
        fit(model=tmp_path / "nan", loss=loss, lr=1e-5)
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/checkpoint-*"))


def test_a_learning_rate_that_explodes_stops_before_the_weights_are_spoiled(fit, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is"):
        fit(lr=1e30, max_steps=20, save_every=1, warmup_steps=0)
    for path in checkpoint.checkpoints(tmp_path / "out"):
        assert all(value.isfinite().all() for value in weights(path).values())


def test_an_error_is_one_line_and_exit_status_2(tmp_path):
    for flags, message in ((["--loss", "sigmod"], "error: --loss sigmod: there is no such loss"),
                           (["--model", str(tmp_path), "--dataset", "x.jsonl"], "error: ")):
        result = run(command(*flags), cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.startswith(message) and result.stderr.count("\n") == 1
        assert not (tmp_path / "runs").exists()


def test_an_error_inside_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train, "main", lambda *arguments: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        train.run()


# --- real text (minutes)

@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the project's shared data is not here")
@pytest.mark.parametrize("rows, flags, accuracy", [
    ("hh_harmless_512.jsonl", {"batch_size": 16, "micro_batch_size": 8}, 0.0),  # 427 rows are too few to tell on new ones
    ("instructions_600.jsonl", {"batch_size": 32, "micro_batch_size": 16}, 0.7),
])
def test_sft_and_then_dpo_on_real_text(tmp_path, rows, flags, accuracy):
    """A random-weight Llama with GPT-2's tokenizer learns the chosen answers, then to prefer them on prompts it never saw."""
    arguments = ["new", "--tokenizer", SHARED / "tokenizers" / "gpt2", "--hidden_size", "128", "--layers", "2", "--out", tmp_path / "new"]
    subprocess.run([sys.executable, ROOT / "model.py", *arguments], check=True)
    for loss, source, lr in (("sft", "new", 2e-3), ("sigmoid", "sft", 3e-4)):
        given = flags | dict(loss=loss, model=tmp_path / source, output_dir=tmp_path / loss, dataset=SHARED / "data" / rows, lr=lr,
                             epochs=3, max_length=256, eval_share=0.15, log_every=1)
        assert not train.main([f"--{k}={v}" for k, v in given.items()], ALONE)
    metrics = read_metrics(tmp_path / "sigmoid")
    margins = [row["rewards/margins"] for row in metrics if row["split"] == "train"]
    third = len(margins) // 3
    assert sum(margins[-third:]) / third > sum(margins[:third]) / third + 0.1
    assert metrics[-1]["split"] == "eval" and metrics[-1]["rewards/accuracies"] > accuracy
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "sigmoid"), AutoTokenizer.from_pretrained(tmp_path / "sigmoid")
    assert model.generate(**tokenizer("Name a colour.\n", return_tensors="pt"), max_new_tokens=8).shape[1] > 5
