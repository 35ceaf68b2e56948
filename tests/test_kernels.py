"""--attn_implementation and --revision: which attention and which files of a model a run reads."""
import json

import pytest
import torch
from conftest import (
    ALONE,
    TINY_RUN,
    differences,
    resume,
    tiny_model,
    to_arguments,
    unfinished,
    weights,
)

import flags
import model as models
import runs
import train
from errors import UserError

REAL = ["--model=m", "--dataset=d"]
STEPS = {"max_steps": 4, "save_every": 2}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_policy_and_reference_have_the_attention_of_the_flag(fit, monkeypatch, kernel):
    load, used = models.load_model, []

    def note(*arguments, **options):
        model = load(*arguments, **options)
        used.append(model.config._attn_implementation)
        return model

    monkeypatch.setattr("reference.load_model", note)
    out, _ = fit(attn_implementation=kernel, max_steps=1, attention="padded")
    assert used == [kernel] * 2
    assert "attn_implementation" not in (out / "config.json").read_text().partition('"flags"')[0]


def test_eager_and_sdpa_train_alike_up_to_rounding(fit):
    """transformers' eager attention has its softmax in float32."""
    _, eager = fit(attn_implementation="eager", dtype="float64", max_steps=3, out="eager")
    _, sdpa = fit(attn_implementation="sdpa", dtype="float64", max_steps=3, out="sdpa")
    assert not differences(eager, sdpa, tolerance=1e-4)
    assert differences(eager, sdpa)


def test_a_resumed_run_keeps_its_attention(fit, capsys):
    flags = STEPS | {"attn_implementation": "eager"}
    whole, _ = fit(**flags, out="whole")
    out = unfinished(fit(**flags)[0])
    resume(out)
    assert "its attention is eager and not sdpa" not in capsys.readouterr().err
    assert not differences(whole, out)
    with pytest.raises(UserError, match="--attn_implementation sdpa: the run in .* has eager"):
        train.main([f"--output_dir={out}", "--resume", "--attn_implementation=sdpa"], ALONE)


@pytest.mark.parametrize("arguments, message", [
    (["--attention=packed", "--attn_implementation=eager"], "--attn_implementation eager: --att"),
    (["--attn_implementation=paged"], "invalid choice: 'paged'"),
    (["--attn_implementation=org/kernel"], "invalid choice"),
])
def test_attention_that_contradicts_other_flags_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        flags.parse_args([*REAL, *arguments])
    assert message in str(error.value)


def test_packed_rows_go_with_sdpa(fit, capsys):
    fit(attention="packed", attn_implementation="sdpa", max_steps=1)
    assert "attention: packed rows" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without flash-attn")
def test_flash_attention_that_is_not_installed_is_one_line_with_the_flag(fit):
    with pytest.raises(UserError, match="--attn_implementation flash_attention_2: is not install"):
        fit(attn_implementation="flash_attention_2")


# --- Revisions ------------------------------------------------------------------------------------

NAME = "org/tiny"


@pytest.fixture(scope="module")
def hub(tokenizer, tmp_path_factory):
    """A cache of the Hub with two revisions of a model: {revision: the folder of its files}"""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "models--org--tiny"
    folders = {}
    for revision, scale in (("main", 1.0), ("v2", 3.0)):
        commit = f"{len(folders):040x}"
        folders[revision] = repository / "snapshots" / commit
        model = tiny_model("llama", tokenizer)
        model.lm_head.weight.data.mul_(scale)
        models.save_model(model, tokenizer, folders[revision])
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    return home, folders


@pytest.fixture
def train_on_hub(hub, pairs, tmp_path, monkeypatch):
    """Train with this cache of the Hub, offline -> the output folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub[0]))

    def run(out, **given):
        given = TINY_RUN | {"max_steps": 2, "lr": 1e-9, "dataset": pairs} | given
        train.main(to_arguments(given | {"output_dir": tmp_path / out}), ALONE)
        return tmp_path / out
    return run


@pytest.mark.parametrize("revision", ["main", "v2", f"{1:040x}"])
def test_a_run_reads_the_weights_of_the_revision_and_no_others(
        hub, train_on_hub, capsys, revision):
    out = train_on_hub("out", model=NAME, revision=revision)
    assert "step-0 check: the loss is 0.6931" in capsys.readouterr().out
    expected = weights(hub[1]["main" if revision == "main" else "v2"])["lm_head.weight"]
    assert torch.allclose(weights(out)["lm_head.weight"], expected, atol=1e-6)


def test_an_adapter_names_the_revision_of_its_base_and_a_second_stage_reads_it(train_on_hub):
    one = train_on_hub("one", model=NAME, revision="v2", lora_rank=2)
    assert json.loads((one / "adapter_config.json").read_text())["revision"] == "v2"
    two = train_on_hub("two", adapter=one)
    assert json.loads((two / "run.json").read_text())["flags"]["revision"] == "v2"
    with pytest.raises(UserError, match="base"):
        train_on_hub("three", adapter=one, revision="main")


@pytest.mark.parametrize("left", [["run.json"], []], ids=["of a run", "of PEFT"])
def test_an_adapter_without_a_tokenizer_is_opened_with_that_of_its_bases_revision(
        hub, train_on_hub, left):
    out = train_on_hub("out", model=NAME, revision="v2", lora_rank=2)
    for path in out.iterdir():
        if path.is_file() and not path.name.startswith("adapter") and path.name not in left:
            path.unlink()
    template = hub[1]["v2"] / "chat_template.jinja"
    template.write_text("of v2")
    try:
        assert runs.open_run(str(out)).tokenizer.chat_template == "of v2"
    finally:
        template.unlink()


def test_a_revision_that_does_not_exist_is_one_line(train_on_hub):
    with pytest.raises(UserError, match="^org/tiny: not found locally or on the Hub"):
        train_on_hub("out", model=NAME, revision="v3")


@pytest.mark.parametrize("model", ["world", "FOLDER"])
def test_a_folder_has_no_revisions(folder, model):
    model = model.replace("FOLDER", folder)
    with pytest.raises(UserError, match="--revision v2: --model .* has no revisions; leave it out"):
        flags.parse_args([f"--model={model}", "--dataset=world", "--revision=v2"])
