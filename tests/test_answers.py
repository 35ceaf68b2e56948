"""Rows of labels and of lists, from the file to the update: KTO's reference point, weights, rows of
different lengths, the reference's cache, resumed runs and metrics.

test_many_answers.py has the losses themselves. Everything is float64, and a comparison is exact
unless it says otherwise.
"""
import math

import numpy as np
import pytest
import torch
from conftest import (
    differences,
    make_rows,
    marked_slow,
    read_metrics,
    resume,
    tiny_model,
    unfinished,
    write_jsonl,
)
from datasets import Dataset
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import model as models
from answers import partners
from errors import UserError

LABELS, LISTS = ["kto", "bco", "apo_zero_unpaired"], ["plackett_luce", "infonca", "softmax_dpo"]
ROUNDED = 1e-10
STEADY = {"dtype": "float64", "lr": 1e-30, "max_grad_norm": 1e9, "eval_share": 0,
          "micro_batch_size": 64}


# --- Rows and runs --------------------------------------------------------------------------------

def labelled(count, seed=0, **more):
    """Answers with labels, of which about a third is desirable."""
    made = []
    for i, row in enumerate(make_rows(count, seed)):
        side = "rejected" if i % 3 else "chosen"
        made.append({"prompt": row["prompt"], "completion": row[side], "label": i % 3 == 0} | more)
    return made


def listed(counts=(2, 5, 3, 2, 4, 2, 3, 7), seed=0):
    """Lists of these numbers of answers with scores, best first."""
    made = []
    for i, (count, row) in enumerate(zip(counts, make_rows(len(counts), seed))):
        others = make_rows(count, seed=100 + i)
        answers = [other["chosen"] + f" {k}" for k, other in enumerate(others)]
        scores = [count - k + 0.1 * i for k in range(count)]
        made.append({"prompt": row["prompt"], "responses": answers, "scores": scores})
    return made


def rows_for(loss, count=8):
    return labelled(count) if loss in LABELS else listed()[:count]


def gradients_of(fit, rows, tmp_path, name="out", **flags):
    """Train on the rows -> the gradient of each step, one vector, and the metrics."""
    path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    steps = []

    def before_step(optimizer, args, kwargs):
        found = [parameter.grad.flatten().clone() for group in optimizer.param_groups
                 for parameter in group["params"]]
        if torch.cat(found).any():
            steps.append(torch.cat(found))

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        _, metrics = fit(out=name, **(STEADY | {"dataset": path} | flags))
    finally:
        hook.remove()
    return steps, metrics


def are_close(left, right, tolerance=ROUNDED):
    scale = right.abs().max()
    assert scale > 0
    return bool((left - right).abs().max() <= tolerance * scale)


@pytest.fixture(scope="module")
def other(tokenizer, tmp_path_factory):
    """A model with other weights, as a reference: its log-ratios are not 0."""
    path = tmp_path_factory.mktemp("other")
    model = tiny_model("llama", tokenizer)
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    models.save_model(model, tokenizer, path)
    return str(path)


# --- KTO's partners -------------------------------------------------------------------------------

def keyed(keys):
    return Dataset.from_dict({"prompt_key": keys})


@pytest.mark.parametrize("keys", [
    [5], [5, 5], [5, 5, 5], [1, 2], [2, 1, 3], [1, 1, 2], [1, 2, 2], [1, 2, 2, 2, 2], [3, 3, 1, 3],
    [1, 1, 2, 2], [2, 1, 2, 1, 3, 3, 3], [1, 1, 1, 2, 3], [9, 4, 9, 4, 9, 4, 9], [*range(20)] * 3,
])
def test_each_row_is_the_partner_of_one_row_and_as_many_as_possible_have_another_prompt(keys):
    found, keys = partners(keyed(keys)), np.array(keys)
    assert sorted(found) == list(range(len(keys)))
    most = np.bincount(keys).max()
    # Of a prompt with most of the rows, only a part can have the answer of another prompt.
    alike = max(0, 2 * most - len(keys))
    assert (keys[found] == keys).sum() == alike


def test_the_partners_of_distinct_prompts_do_not_depend_on_the_order_of_the_rows():
    keys = np.random.default_rng(0).permutation(1000)[:30]
    order = np.random.default_rng(1).permutation(30)
    pairs = set(zip(keys, keys[partners(keyed(keys))]))
    assert set(zip(keys[order], keys[order][partners(keyed(keys[order]))])) == pairs


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_ktos_reference_point_is_the_same_for_any_order_and_any_micro_batches(
        fit, folder, other, tmp_path, attention):
    flags = {"loss": "kto", "model": other, "ref_model": folder, "attention": attention,
             "beta": 0.5}
    rows, expected = labelled(9), None
    cases = {"whole": {}, "ones": {"micro_batch_size": 1}, "four": {"micro_batch_size": 4},
             "tokens": {"tokens_per_micro_batch": 40, "micro_batch_size": None},
             "other order": {"seed": 3}, "reversed": {}}
    for name, more in cases.items():
        file = rows[::-1] if name == "reversed" else rows
        gradients, metrics = gradients_of(fit, file, tmp_path, name, batch_size=9, max_steps=1,
                                          **flags, **more)
        expected = expected or (metrics[0]["kl"], gradients[0])
        assert metrics[0]["kl"] == pytest.approx(expected[0], rel=ROUNDED)
        assert metrics[0]["kl"] > 0
        assert are_close(gradients[0], expected[1])


def test_kl_is_the_mean_log_ratio_of_the_answers_of_the_partners(fit, folder, other, tokenizer,
                                                                 tmp_path):
    rows = labelled(9)
    _, metrics = gradients_of(fit, rows, tmp_path, loss="kto", ref_model=other, batch_size=9,
                              max_steps=1)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    loaded, _ = data.load_tokens(path, tokenizer, data.Needs("labels", ()))
    ratios = []
    for i, partner in enumerate(partners(loaded)):
        prompt, answer = loaded[i]["prompt_ids"], loaded[int(partner)]["answer_ids"][0]
        logps = []
        for source in (folder, other):
            model = models.load_model(source, torch.float64)
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                scores = model(input_ids=ids).logits[0].log_softmax(-1)
            places = torch.arange(len(prompt), len(prompt) + len(answer))
            logps.append(scores[places - 1, ids[0, places]].sum())
        ratios.append(logps[0] - logps[1])
    assert metrics[0]["kl"] == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-9)


# --- Weights --------------------------------------------------------------------------------------

def weighted(rows, weights):
    return [row | {"weight": weight} for row, weight in zip(rows, weights)]


# Powers of 2, because RMSNorm rounds a gradient to float32: a factor of 3 would round otherwise.
@pytest.mark.parametrize("loss", ["bco", "plackett_luce", "infonca", "sigmoid"])
def test_a_weight_multiplies_the_gradient_of_its_row_and_0_removes_it(fit, other, tmp_path, loss):
    """The mean over 8 rows, of which 4 have the weight 2, is the mean over these 4 alone."""
    rows = make_rows(8) if loss == "sigmoid" else rows_for(loss)
    flags = {"loss": loss, "batch_size": 8, "max_steps": 1, "micro_batch_size": 3, "beta": 0.5,
             "ref_model": other}
    weights = [2, 0, 2, 0, 2, 0, 2, 0]
    half, metrics = gradients_of(fit, weighted(rows, weights), tmp_path, "half", **flags)
    kept = [row for row, weight in zip(rows, weights) if weight]
    alone, expected = gradients_of(fit, kept, tmp_path, "alone", **flags)
    assert are_close(half[0], alone[0])
    assert metrics[0]["loss"] == pytest.approx(expected[0]["loss"], rel=ROUNDED)


@pytest.mark.parametrize("loss", ["kto", "bco", "infonca", "ipo"])
def test_the_gradient_is_linear_in_the_weights(fit, other, tmp_path, loss):
    """Of KTO too, whose reference point is that of all rows, whatever their weights."""
    rows = make_rows(8) if loss == "ipo" else rows_for(loss)
    flags = {"loss": loss, "ref_model": other, "batch_size": 8, "max_steps": 1, "beta": 0.5}
    left, right = [4, 0, 1, 0, 0.5, 0, 2, 1], [0, 2, 0, 0.25, 0, 8, 0, 0]
    both = [one + two for one, two in zip(left, right)]
    found, kls = {}, []
    for name, weights in (("left", left), ("right", right), ("both", both), ("plain", [1] * 8)):
        found[name], metrics = gradients_of(fit, weighted(rows, weights), tmp_path, name, **flags)
        kls.append(metrics[0].get("kl"))
    assert are_close(found["left"][0] + found["right"][0], found["both"][0])
    assert not are_close(found["both"][0], found["plain"][0], 0.01)
    assert len(set(kls)) == 1


@pytest.mark.parametrize("loss", ["kto", "plackett_luce", "sigmoid", "aot"])
def test_weights_of_1_change_no_bit(fit, tmp_path, loss):
    rows = make_rows(8) if loss in ("sigmoid", "aot") else rows_for(loss)
    outs = []
    for name, file in (("without", rows), ("ones", weighted(rows, [1] * len(rows)))):
        path = write_jsonl(tmp_path / f"{name}.jsonl", file)
        outs.append(fit(loss=loss, dataset=path, out=name)[0])
    assert not differences(*outs)


@pytest.mark.parametrize("loss", ["aot", "kto_pair", "dr_dpo", "aot,sft"])
def test_weights_with_a_loss_that_compares_the_pairs_of_a_step_are_one_error(fit, tmp_path, loss):
    """It has no loss of a single pair that a weight could multiply."""
    path = write_jsonl(tmp_path / "rows.jsonl", weighted(make_rows(8), range(8)))
    plain = write_jsonl(tmp_path / "plain.jsonl", make_rows(8))
    beta = {"beta": 0.1} if "," in loss else {}
    for files in ({"dataset": path}, {"dataset": plain, "eval_dataset": path}):
        with pytest.raises(UserError, match=f"--loss {loss}: .*column 'weight'.* --ignore_columns"):
            fit(loss=loss, eval_share=None, **files, **beta)
    fit("--ignore_columns=weight", loss=loss, dataset=path, **beta)


# --- Lists of different lengths -------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["padded", "packed"])
@pytest.mark.parametrize("loss", marked_slow(LISTS, LISTS[1:]))
def test_the_gradient_of_lists_of_different_lengths_is_the_mean_of_those_of_the_lists_alone(
        fit, other, tmp_path, loss, attention):
    rows, flags = listed(), {"loss": loss, "ref_model": other, "max_steps": 1, "beta": 0.5}
    (whole,), metrics = gradients_of(fit, rows, tmp_path, batch_size=8, micro_batch_size=3,
                                     attention=attention, **flags)
    parts, losses = [], []
    for i, row in enumerate(rows):
        (part,), (alone, *_) = gradients_of(fit, [row], tmp_path, f"row {i}", attention=attention,
                                          **flags)
        parts.append(part)
        losses.append(alone["loss"])
    assert are_close(whole, sum(parts) / 8)
    assert metrics[0]["loss"] == pytest.approx(sum(losses) / 8, rel=ROUNDED)


@pytest.mark.parametrize("loss", ["plackett_luce", "softmax_dpo"])
def test_lists_of_two_train_as_pairs_do(fit, pairs, tmp_path, loss):
    """Both losses are `sigmoid` at K = 2."""
    flags = {"dataset": pairs, "dtype": "float64", "beta": 0.3}
    as_lists, metrics = fit(loss=loss, out="lists", **flags)
    as_pairs, _ = fit(loss="sigmoid", out="pairs", **flags)
    assert not differences(as_lists, as_pairs, 1e-9)
    first, expected = metrics[0], read_metrics(as_pairs)[0]
    for name in expected.keys() - {"tokens_per_second", "split"}:
        assert first[name] == pytest.approx(expected[name], rel=1e-12), name


# --- The cache of the reference -------------------------------------------------------------------

@pytest.mark.parametrize("loss", LABELS + LISTS)
@pytest.mark.parametrize("way", ["copy", "adapter off", "other model"])
def test_a_cached_reference_gives_the_metrics_of_one_that_is_computed(
        fit, other, tmp_path, monkeypatch, loss, way):
    monkeypatch.chdir(tmp_path)
    flags = {"loss": loss, "dataset": write_jsonl(tmp_path / "rows.jsonl", rows_for(loss) * 2),
             "dtype": "float64", "eval_share": 0.3, "eval_every": 1, "batch_size": 4}
    if way == "adapter off":
        flags |= {"lora_rank": 4}
    if way == "other model":
        flags |= {"ref_model": other}
    computed, _ = fit(out="computed", **flags)
    for name in ("cached", "read"):
        cached, _ = fit(out=name, ref="cache", **flags)
        assert not differences(computed, cached, 1e-9)


def test_losses_that_read_other_columns_do_not_share_a_cache(fit, other, tmp_path, monkeypatch,
                                                             capsys):
    """That of KTO has the log-probs of mismatched answers too."""
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(tmp_path / "rows.jsonl", labelled(12))
    flags = {"dataset": path, "dtype": "float64", "ref_model": other}
    for loss in ("bco", "kto", "apo_zero_unpaired"):
        computed, _ = fit(loss=loss, out=loss, **flags)
        cached, _ = fit(loss=loss, out=f"{loss} cached", ref="cache", **flags)
        assert not differences(computed, cached, 1e-9)
    printed = capsys.readouterr().out
    assert printed.count("rows kept in runs") == 2 * 2 and "rows read from" in printed


def test_a_cache_of_kto_belongs_to_one_max_length(fit, other, tmp_path, monkeypatch):
    """It truncates the answers of other rows, even where no row is truncated."""
    monkeypatch.chdir(tmp_path)
    rows = labelled(8)
    for i, row in enumerate(rows):
        if i % 2:
            row["prompt"] = f"{i}" + " cat" * 30
        else:
            row["completion"] = " dog" * 30
    flags = {"dataset": write_jsonl(tmp_path / "rows.jsonl", rows), "dtype": "float64",
             "ref_model": other, "loss": "kto", "batch_size": 16}
    for length in (64, 50):
        computed, _ = fit(out=f"{length}", max_length=length, **flags)
        cached, _ = fit(out=f"{length} cached", max_length=length, ref="cache", **flags)
        assert not differences(computed, cached, 1e-9)


@pytest.mark.parametrize("loss", ["kto", "plackett_luce"])
def test_a_damaged_cache_is_computed_again(fit, tmp_path, monkeypatch, capsys, loss):
    monkeypatch.chdir(tmp_path)
    flags = {"loss": loss, "dataset": write_jsonl(tmp_path / "rows.jsonl", rows_for(loss)),
             "ref": "cache", "dtype": "float64", "eval_share": 0}
    first, _ = fit(out="first", **flags)
    path, = (tmp_path / "runs" / "references").iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    second, _ = fit(out="second", **flags)
    assert "is damaged" in capsys.readouterr().out
    assert not differences(first, second)


# --- Killed and resumed ---------------------------------------------------------------------------

@pytest.mark.parametrize("ref", ["model", "cache", "adapter"])
@pytest.mark.parametrize("loss", ["kto", "bco", "plackett_luce", "infonca"])
def test_a_killed_and_resumed_run_ends_bit_for_bit_the_same(
        fit, tmp_path, monkeypatch, loss, ref):
    monkeypatch.chdir(tmp_path)
    flags = {"loss": loss, "dataset": write_jsonl(tmp_path / "rows.jsonl", rows_for(loss, 14)),
             "eval_every": 2, "save_every": 3, "max_steps": 8, "batch_size": 3, "eval_share": 0.2,
             "keep_checkpoints": 9}
    if ref == "adapter":
        flags |= {"lora_rank": 4, "lora_dropout": 0.3}
    if ref == "cache":
        flags |= {"ref": "cache"}
    whole, _ = fit(out="whole", **flags)
    killed, _ = fit(out="killed", **flags)
    assert not resume(unfinished(killed))
    assert not differences(whole, killed)


# --- Metrics --------------------------------------------------------------------------------------

def test_metrics_of_labels_are_means_over_their_group_and_json_has_no_nan(fit, folder, other,
                                                                          tokenizer, tmp_path):
    rows = labelled(12)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    out, metrics = fit(loss="bco", dataset=path, dtype="float64", ref_model=other, eval_share=0,
                       batch_size=2, micro_batch_size=1, beta=0.5)
    steps = [row for row in metrics if row["split"] == "train"]
    shares = {row["desirable"] for row in steps}
    assert 0.0 in shares and len(shares) > 1
    for row in steps:
        assert ("rewards/chosen" in row) == ("logps/chosen" in row) == (row["desirable"] > 0)
        assert ("rewards/rejected" in row) == ("logps/rejected" in row) == (row["desirable"] < 1)
        assert ("rewards/margins" in row) == (0 < row["desirable"] < 1)
        assert all(math.isfinite(value) for value in row.values() if value != "train")
    assert "NaN" not in (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_evaluation_of_labels_is_over_all_held_out_rows(fit, folder, other, tokenizer, tmp_path,
                                                        attention):
    """With a step for all rows, the metrics of an evaluation are those of a training step on the
    held-out rows, and `kl` among them."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", labelled(7, seed=5))
    for loss in ("kto", "bco"):
        _, evaluated = gradients_of(fit, labelled(9), tmp_path, f"{loss} a", loss=loss, max_steps=1,
                                    ref_model=other, eval_dataset=held_out, micro_batch_size=2,
                                    attention=attention, eval_share=None)
        _, trained = gradients_of(fit, labelled(7, seed=5), tmp_path, f"{loss} b", loss=loss,
                                  ref_model=other, max_steps=1, batch_size=7)
        evaluation, step = evaluated[-1], trained[0]
        assert evaluation["split"] == "eval"
        names = evaluation.keys() - {"step", "split", "loss"}
        assert {"kl"} & names == ({"kl"} if loss == "kto" else set())
        for name in names | ({"loss"} if loss == "kto" else set()):  # BCO's shift has moved
            assert evaluation[name] == pytest.approx(step[name], rel=ROUNDED), name


def test_the_averages_of_bco_are_metrics_under_their_own_names(fit, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", labelled(20))
    _, metrics = fit(loss="bco", dataset=path, dtype="float64", beta=0.5)
    steps = [row for row in metrics if row["split"] == "train"]
    assert steps[0]["delta"] == 0 and len(steps) >= 3
    averages = {"mean_chosen_reward", "mean_rejected_reward"}
    for row in steps[1:]:
        assert averages < row.keys()
        assert row["delta"] == pytest.approx(sum(row[name] for name in averages) / 2)
        assert row["rewards/chosen"] != row["mean_chosen_reward"]


# --- Truncated answers ----------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_an_answer_behind_a_longer_prompt_of_another_row_is_truncated_with_its_turns_of_a_tool(
        fit, tokenizer, tmp_path, attention):
    """Positions of tokens that are not scored may lie behind the cut."""
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>"
                        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    turn = dict
    answer = [turn(role="assistant", content="call"), turn(role="tool", content="rain " * 9),
              turn(role="assistant", content="it rains")]
    rows = []
    for i in range(6):
        prompt = [turn(role="user", content=f"{i} " + "cat " * (60 if i % 2 else 1))]
        completion = [turn(role="assistant", content="yes")] if i % 2 else answer
        rows.append({"prompt": prompt, "completion": completion, "label": i < 3})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, metrics = fit(loss="kto", dataset=path, chat_template=template, attention=attention,
                     max_length=100, eval_share=0, lr=1e-3)
    assert math.isfinite(metrics[-1]["loss"]) and "kl" in metrics[0]


# --- Rows that cannot be trained on ---------------------------------------------------------------

def test_labels_that_are_alike_after_rows_were_held_out_are_an_error(fit, tmp_path):
    path, errors = write_jsonl(tmp_path / "rows.jsonl", labelled(2)), []
    for tenths in range(1, 10):
        try:
            fit(loss="kto", dataset=path, eval_share=tenths / 10, out=f"{tenths}")
        except UserError as error:
            errors.append(str(error))
    words = "rows.jsonl, without the held-out rows: every answer has the label"
    assert any(words in error for error in errors), errors


@pytest.mark.parametrize("loss", ["kto", "sigmoid"])
def test_weights_that_are_all_0_are_an_error(fit, tmp_path, loss):
    rows = weighted(labelled(6) if loss == "kto" else make_rows(6), [0] * 6)
    with pytest.raises(UserError, match="rows.jsonl: every row has the weight 0"):
        fit(loss=loss, dataset=write_jsonl(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("loss", ["sft", "npo"])
def test_pairs_of_a_loss_that_reads_one_answer_of_a_row_are_an_error(fit, tmp_path, loss):
    path = write_jsonl(tmp_path / "rows.jsonl", listed())
    with pytest.raises(UserError, match=f"--pairs all: {loss} reads no pairs but one answer"):
        fit(loss=loss, dataset=path, pairs="all")
