"""The model card of a finished run, and its upload to the Hub."""
import json
import pathlib
import re
import socket
import subprocess
import sys

import huggingface_hub
import pytest
from conftest import (
    ROOT,
    TINY_RUN,
    command,
    read_metrics,
    resume,
    run_training,
    tiny_model,
    to_arguments,
    unfinished,
)
from transformers import AutoTokenizer, GenerationConfig

import card
import files
import flags
import hub
import losses
import model as models
from errors import UserError

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}" \
           "{% endfor %}"


def read_card(folder):
    return (folder / "README.md").read_text()


def code_of(text):
    return re.search("```python\n(.*?)```", text, re.DOTALL)[1]


# --- The card -------------------------------------------------------------------------------------

def test_the_hub_reads_the_metadata_of_a_card_which_names_no_license(fit):
    out, _ = fit(loss="sigmoid:0.8,sft:1", lora_rank=2)
    data = huggingface_hub.ModelCard.load(out / "README.md").data
    assert data.library_name == "peft" and data.license is None and data.base_model is None
    assert data.tags == ["preference-optimization", "sigmoid", "sft", "lora"]
    assert "has not chosen a license" in read_card(out)


@pytest.mark.parametrize("name", ["org/name", "gpt2", "org/007", "org/on"])
def test_the_base_is_the_one_on_the_hub_through_the_runs_in_between(tmp_path, name):
    for folder, base in (("sft", name), ("dpo", str(tmp_path / "sft"))):
        (tmp_path / folder).mkdir()
        content = {"model_type": "llama", "flags": {"model": base, "loss": "sft"}}
        (tmp_path / folder / "config.json").write_text(json.dumps(content))
    for model in (name, str(tmp_path / "sft"), str(tmp_path / "dpo")):
        text = card.front_matter(tmp_path / "dpo", {"model": model}, losses.LOSSES["ipo"])
        assert huggingface_hub.ModelCard(text).data.base_model == name


@pytest.mark.parametrize("model", ["world", "./gone", "/gone/model"])
def test_a_folder_is_no_base_on_the_hub(model):
    assert card.hub_base({"model": model}) is None


def test_a_folder_whose_origin_is_not_known_is_no_base_on_the_hub(folder):
    assert card.hub_base({"model": folder}) is None


@pytest.mark.parametrize("name", losses.LOSSES)
def test_the_card_has_formula_and_paper_of_each_loss_from_its_docstring(name):
    text = card.describe_loss(losses.LOSSES[name])
    formula = re.search("```text\n(.*?)```", text, re.DOTALL)[1]
    assert "=" in formula and formula == formula.strip() + "\n"
    assert not re.search(r"^(Paper|Gradient|Args|Elsewhere)", text, re.MULTILINE)
    assert "](https://arxiv.org/abs/" in text
    documented = {line.strip() for line in losses.LOSSES[name].__doc__.splitlines()}
    for line in formula.splitlines()[1:]:
        assert line.strip() in documented
    assert f"Formula    {formula.splitlines()[0]}" in documented


def test_the_card_has_every_part_of_a_weighted_sum_with_its_weight():
    text = card.describe_loss(losses.find("sigmoid:0.8,bco_pair:0.2,sft"))
    assert re.findall("^### (.*)", text, re.MULTILINE) == [
        "0.8 × sigmoid", "0.2 × bco_pair", "1 × sft"]


def test_the_table_has_the_last_metrics_of_training_and_evaluation(fit):
    out, rows = fit(epochs=2, eval_every=2)
    text = read_card(out)
    train = [row for row in rows if row["split"] == "train"][-1]
    held_out = [row for row in rows if row["split"] == "eval"][-1]
    assert f"After {train['step']} optimizer steps" in text
    for name in ("loss", "rewards/accuracies", "logps/rejected"):
        line = f"(`{name}`) | {train[name]:.4g} | {held_out[name]:.4g} |"
        assert line in text
    assert f"(`grad_norm`) | {train['grad_norm']:.4g} |  |" in text


def test_the_card_has_the_hyperparameters_of_the_loss_and_every_changed_flag(fit):
    out, _ = fit(loss="ipo", beta=0.3, shuffle="false", lora_rank=2)
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", read_card(out), re.MULTILINE))
    assert table["beta"] == "0.3" and table["shuffle"] == "False" and table["lora_rank"] == "2"
    assert table["lr"] == "0.01" and table["lora_alpha"] == "4" and table["batch_size"] == "8"
    assert not table.keys() & {"dora", "output_dir", "log_every", "model", "dataset"}


def test_the_card_shows_the_curves_only_if_they_are_there(fit):
    pytest.importorskip("matplotlib")
    out, _ = fit()
    shown = "](curves.png)"
    assert shown in read_card(out)
    (out / "curves.png").unlink()
    saved = json.loads((out / "config.json").read_text())["flags"]
    assert shown not in card.make_card(out, saved)


def test_the_code_of_the_card_loads_a_full_model_which_answers(fit, capsys):
    out, _ = fit()
    names = {}
    exec(code_of(read_card(out)), names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert "AutoPeft" not in read_card(out) and "peft" not in code_of(read_card(out))


def test_the_code_of_the_card_loads_an_adapter_in_peft(fit):
    pytest.importorskip("peft")
    out, _ = fit(lora_rank=2)
    names = {}
    exec(code_of(read_card(out)), names)
    assert names["model"].peft_config["default"].r == 2
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_the_code_of_an_adapter_names_its_base_and_the_name_on_the_hub(fit, folder):
    out, _ = fit(lora_rank=2)
    saved = json.loads((out / "run.json").read_text())["flags"]
    code = code_of(card.make_card(out, saved | {"push_to_hub": "me/mine"}))
    assert f'AutoModelForCausalLM.from_pretrained("{folder}")' in code
    assert 'PeftModel.from_pretrained(base, "me/mine")' in code
    compile(code, "card", "exec")
    assert "BitsAndBytesConfig" not in read_card(out)
    assert "load_in_4bit=True" in card.make_card(out, saved | {"quantize": "nf4"})


@pytest.fixture
def chat_model(tokenizer, tmp_path):
    """A model with a chat template and a generation config of its own."""
    own = AutoTokenizer.from_pretrained(save_tokenizer(tokenizer, tmp_path / "tokenizer"))
    own.chat_template = TEMPLATE
    model = tiny_model("llama", own)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.1, max_new_tokens=9,
        eos_token_id=[0, 1])
    models.save_model(model, own, tmp_path / "chat")
    return str(tmp_path / "chat")


def save_tokenizer(tokenizer, path):
    tokenizer.save_pretrained(path)
    return path


def test_chat_template_and_generation_config_of_the_base_are_kept(fit, chat_model):
    out, _ = fit(model=chat_model, max_steps=1)
    before, after = (GenerationConfig.from_pretrained(path).to_diff_dict()
                     for path in (chat_model, out))
    assert after == before and after["temperature"] == 0.7 and after["eos_token_id"] == [0, 1]
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert "apply_chat_template" in code_of(read_card(out))
    names = {}
    exec(code_of(read_card(out)), names)
    assert names["prompt"] == "<user>Hello"


# --- Whose README.md it is ------------------------------------------------------------------------

STEPS = {"max_steps": 6, "save_every": 2}


def test_a_readme_that_a_user_put_there_is_kept_under_another_name(fit, capsys):
    out, _ = fit(**STEPS)
    unfinished(out)
    files.write_list(out, files.read_list(out) - {"README.md", "curves.png"})
    (out / "README.md").write_text("mine")
    resume(out)
    assert (out / "README.md-2").read_text() == "mine"
    assert read_card(out).startswith("---\n")
    assert f"{out / 'README.md'} was not written by this run" in capsys.readouterr().out


def test_a_run_that_was_killed_before_its_card_gets_it_when_it_is_resumed(fit):
    out, _ = fit(**STEPS)
    text, weights = read_card(out), (out / "model.safetensors").read_bytes()
    (out / "README.md").unlink()
    files.write_list(out, files.read_list(out) - {"README.md"})
    assert not resume(out)
    assert read_card(out) == text and (out / "model.safetensors").read_bytes() == weights


def test_two_processes_complete_a_run_that_was_killed_before_its_card(fit):
    out, _ = fit(**STEPS)
    (out / "README.md").unlink()
    ended = run_training({"output_dir": out, "resume": True}, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert read_card(out).startswith("---\n")


def test_a_card_that_its_author_edited_stays_when_a_complete_run_is_resumed(fit):
    out, _ = fit(**STEPS)
    (out / "README.md").write_text(read_card(out) + "license: mit\n")
    resume(out)
    assert read_card(out).endswith("license: mit\n")


def test_a_resumed_run_writes_the_card_of_an_uninterrupted_one(fit, tmp_path):
    out, _ = fit(**STEPS)
    text = read_card(out)
    resume(unfinished(out))
    speed = r"\| speed .*"
    assert re.sub(speed, "", read_card(out)) == re.sub(speed, "", text)


# --- The Hub --------------------------------------------------------------------------------------

@pytest.fixture
def hub_is_there(monkeypatch):
    """A token, and no check of the network."""
    monkeypatch.setattr(hub, "stop_hub_retries", lambda: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")


def refused(name):
    with pytest.raises(UserError) as caught:
        flags.parse_args(["--model=none", "--dataset=none", f"--push_to_hub={name}"])
    return str(caught.value)


@pytest.mark.parametrize("name", ["a/b/c", "../x", "-a", "a b", "a/b.git", "x" * 97, "me/a--b"])
def test_a_name_that_the_hub_does_not_allow_is_refused_before_a_model_is_loaded(
        hub_is_there, name):
    assert refused(name).startswith((
        f"--push_to_hub {name}: Repo", f"--push_to_hub {name}: Cannot have --"))


def test_without_a_token_or_network_the_flag_is_refused_before_a_model_is_loaded(
        hub_is_there, monkeypatch):
    assert "give the name of the repository" in refused("true")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no token of the Hub; run `hf auth login`" in refused("me/mine")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "there is no network, or HF_HUB_OFFLINE is set" in refused("me/mine")


def test_the_files_of_the_run_are_uploaded_and_nothing_else(fit, hub_is_there, monkeypatch):
    uploads = []

    def create_repo(name, exist_ok):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{name}")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **call: uploads.append(call))
    out, _ = fit(push_to_hub="mine", **STEPS)
    (out / "notes.txt").write_text("private")
    resume(out)
    assert (out / "checkpoint-4").is_dir()
    for call in uploads:
        assert call["repo_id"] == "me/mine" and call["folder_path"] == out
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "curves.png",
                "metrics.jsonl", "generation_config.json"} <= set(call["allow_patterns"])
        assert all((out / name).is_file() for name in call["allow_patterns"])
        assert not {"notes.txt", ".lock", ".written.json"} & set(call["allow_patterns"])
    assert len(uploads) == 2
    assert '"mine"' in code_of(read_card(out))


def test_a_refused_connection_is_one_line_and_the_model_is_saved(folder, pairs, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    out = tmp_path / "out"
    run = TINY_RUN | {"model": folder, "dataset": pairs, "output_dir": out, "max_steps": 1,
                      "push_to_hub": "me/mine"}
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_TOKEN": "hf_none",
                   "HF_HUB_OFFLINE": "0", "PATH": str(pathlib.Path(sys.executable).parent),
                   "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command(*to_arguments(run)), env=environment, capture_output=True,
                           text=True, timeout=300, cwd=ROOT)
    assert ended.returncode == 2, ended.stderr
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("error: --push_to_hub me/mine: ") and "refused" in line
    assert line.endswith(
        f"the model is saved in {out}. To push it again: python train.py --output_dir {out} "
        "--resume --push_to_hub me/mine")
    assert "Traceback" not in ended.stderr
    assert (out / "model.safetensors").exists() and (out / "README.md").exists()
    assert read_metrics(out)
