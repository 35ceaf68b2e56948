"""The curves of runs, and the trackers of --report_to."""
import importlib.util
import json
import math
import sys
import types

import forked
import pytest
import torch
from conftest import (
    ROOT,
    differences,
    read_metrics,
    read_samples,
    resume,
    unfinished,
    write_jsonl,
)

import checkpoint
import files
import flags
import log
import parallel
import plots
import trackers
from errors import UserError

STEPS = {"max_steps": 6, "save_every": 2, "eval_every": 2}
SAMPLED = {"sample_every": 3, "sample_prompts": 2, "sample_tokens": 3, "eval_share": 0.3}
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None,
                                      reason="matplotlib draws")


def make_rows(steps=4, **more):
    """Rows of training after each step, and of an evaluation after every second one."""
    rows = []
    for step in range(1, steps + 1):
        shared = {"loss": 1 / step, "logps/chosen": -10.0 * step} | more
        rows.append({"step": step, "split": "train", **shared, "lr": 1e-6, "grad_norm": 1.0})
        if step % 2 == 0:
            rows.append({"step": step, "split": "eval", **shared})
    return rows


def make_run(folder, rows):
    folder.mkdir(parents=True)
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def titles(figure):
    return [panel.get_title(loc="left") for panel in figure.axes]


def drawn_lines(panel):
    """[(color, width, marker, xs, ys)] of a panel."""
    return [(line.get_color(), line.get_linewidth(), line.get_marker(),
             list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]


# --- Reading --------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", [1, 9, 30, -2])
def test_half_of_a_last_line_which_a_run_is_writing_is_left_out(tmp_path, end):
    run = make_run(tmp_path / "run", make_rows(2))
    line = json.dumps(make_rows(1)[0]) + "\n"
    with open(run / "metrics.jsonl", "a") as file:
        file.write(line[:end])
    assert plots.read_metrics(run) == make_rows(2)


@pytest.mark.parametrize("line", ["not a row", '{"step": 2', "[]", '{"step": "2", "split": "eval"}',
                                  '{"step": 2}', ""])
def test_a_line_that_is_no_row_is_refused_by_its_number(tmp_path, line):
    run = make_run(tmp_path / "run", make_rows(1))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is no row of a run"):
        plots.read_metrics(run)


def test_a_folder_without_metrics_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: has no metrics.jsonl; give the folder"):
        log.main([str(tmp_path), "--plot", str(tmp_path / "a.png")])


def test_two_folders_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [str(make_run(tmp_path / name / "out", make_rows())) for name in "ab"]
    assert [run.name for run in plots.named_runs(folders)] == folders
    assert [run.name for run in plots.named_runs(folders[:1])] == ["out"]


# --- Drawing --------------------------------------------------------------------------------------

@needs_matplotlib
def test_only_metrics_that_a_run_has_get_a_panel():
    figure = plots.draw_curves([plots.Curves("sft", make_rows())])
    assert titles(figure) == ["loss", "log-prob of chosen", "gradient norm", "learning rate"]
    world_row = {"step": 4, "split": "world", "world/share": 0.9, "world/mass": 0.8}
    both = [plots.Curves("sft", make_rows()), plots.Curves("world", [world_row])]
    assert titles(plots.draw_curves(both))[-2:] == [
        "share of the achievable", "mass on well-formed answers"]


@needs_matplotlib
def test_every_panel_has_a_unit_and_the_lowest_ones_name_the_step():
    figure = plots.draw_curves([plots.Curves("run", make_rows())])
    assert all(panel.get_ylabel() for panel in figure.axes)
    assert [panel.get_xlabel() for panel in figure.axes] == ["", *["optimizer step"] * 3]
    limits = {panel.get_xlim() for panel in figure.axes}
    assert len(limits) == 1 and limits.pop()[0] == 0


@needs_matplotlib
def test_training_is_a_thin_line_and_evaluations_are_marked_in_the_same_color():
    panel = plots.draw_curves([plots.Curves("run", make_rows())]).axes[0]
    training, held_out = drawn_lines(panel)
    assert training[0] == held_out[0]
    assert training[1] < held_out[1]
    assert training[2] == "None" and held_out[2] not in ("None", "")
    assert training[3:] == ([1, 2, 3, 4], [1, 1 / 2, 1 / 3, 1 / 4])
    assert held_out[3:] == ([2, 4], [1 / 2, 1 / 4])


@needs_matplotlib
def test_each_run_has_a_color_and_marker_of_its_own_and_there_is_one_legend():
    runs = [plots.Curves(f"run {number}", make_rows()) for number in range(12)]
    figure = plots.draw_curves(runs)
    marked = [line[:3:2] for line in drawn_lines(figure.axes[0])[1::2]]
    assert len(set(marked)) == 12
    legend, = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [run.name for run in runs] + ["thin: training", "with markers: held out"]
    assert all(panel.get_legend() is None for panel in figure.axes)


@needs_matplotlib
@pytest.mark.parametrize("name", ["_hidden", "$x^{$", "a" * 80, "-", "x\ny"])
def test_a_run_of_any_name_is_in_the_legend(name, tmp_path):
    figure = plots.draw_curves([plots.Curves(name, make_rows())])
    assert figure.legends[0].get_texts()[0].get_text() in (name, f"…{name[-36:]}")
    figure.savefig(tmp_path / "a.png")


@needs_matplotlib
def test_each_evaluation_set_has_a_line_of_its_own_and_its_name_in_the_legend():
    rows = make_rows()
    for row in make_rows(loss=0.5):
        if row["split"] == "eval":
            rows.append(row | {"split": "eval/far", "loss": 0.25})
            rows.append(row | {"split": "eval/near"})
    rows = [row for row in rows if row["split"] != "eval"]
    figure = plots.draw_curves([plots.Curves("run", rows)])
    lines = figure.axes[0].lines[1:]
    assert [list(line.get_ydata()) for line in lines] == [[0.25] * 2, [0.5] * 2]
    assert len({line.get_linestyle() for line in lines}) == 2
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "run", "thin: training", "held out: far", "held out: near"]
    shown = [line.get_linestyle() for line in legend.get_lines()[2:]]
    assert shown == [line.get_linestyle() for line in lines]


@needs_matplotlib
def test_the_learning_rate_is_labeled_with_no_optimizer_in_particular():
    figure = plots.draw_curves([plots.Curves("run", make_rows())])
    panel, = [panel for panel in figure.axes if panel.get_title(loc="left") == "learning rate"]
    assert panel.get_ylabel() == "of the optimizer"


@needs_matplotlib
@pytest.mark.parametrize("value", [math.nan, math.inf, None, "much"])
def test_a_value_that_is_no_number_leaves_a_gap(value, tmp_path):
    rows = make_rows()
    rows[1]["loss"] = value
    steps, values = plots.series(rows, "loss", "train")
    assert steps == [1, 2, 3, 4] and math.isnan(values[1]) and values[0] == 1
    plots.draw_curves([plots.Curves("run", rows)]).savefig(tmp_path / "a.png")


@needs_matplotlib
@pytest.mark.parametrize("value, text", [
    (0.25, "0.25"), (-120.0, "−120"), (12_000, "12k"), (2_500_000, "2500k"), (5e-7, "5e-7"),
    (0.0, "0"), (-5e-7, "−5e-7"),
])
def test_ticks_are_short_numbers(value, text):
    assert plots.short_number(value) == text


@needs_matplotlib
def test_the_command_draws_finished_runs_and_one_that_is_going_on(tmp_path, capsys):
    runs = [str(make_run(tmp_path / name, make_rows())) for name in ("done", "going")]
    with open(tmp_path / "going" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "spl')
    begun = str(make_run(tmp_path / "begun", []))
    log.main([*runs, begun, "--plot", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{begun}: has no row yet\n"
    with pytest.raises(UserError, match="there is no row to draw yet"):
        log.main([begun, "--plot", str(tmp_path / "curves.png")])


@needs_matplotlib
@pytest.mark.parametrize("name", ["curves.what", "no-such-folder/curves.png"])
def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, name):
    run = make_run(tmp_path / "run", make_rows())
    with pytest.raises(UserError, match=f"--plot .*{name}: "):
        log.main([str(run), "--plot", str(tmp_path / name)])


# --- At the end of a run --------------------------------------------------------------------------

@needs_matplotlib
def test_a_finished_run_has_its_curves_which_are_in_its_list_of_files(fit):
    out, _ = fit()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"curves.png", "README.md"} <= files.read_list(out)


def test_without_matplotlib_a_run_ends_and_a_line_says_how_to_install_it(fit, monkeypatch, capsys):
    forked.hide_matplotlib(monkeypatch.setitem)
    out, _ = fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if "curves.png" in line]
    assert len(lines) == 1 and lines[0].endswith("; pip install matplotlib")
    assert (out / "model.safetensors").exists() and not (out / "curves.png").exists()


@needs_matplotlib
@pytest.mark.parametrize("what", ["metrics", "matplotlib"])
def test_a_picture_that_cannot_be_drawn_fails_no_run(fit, monkeypatch, capsys, what):
    if what == "metrics":
        monkeypatch.setattr(plots, "parse_row", lambda line: None)
    else:
        from matplotlib.figure import Figure

        def savefig(figure, path):
            raise RuntimeError("no font was found")

        monkeypatch.setattr(Figure, "savefig", savefig)
    out, _ = fit()
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{out / 'curves.png'} is not written: ") for line in lines)
    assert (out / "model.safetensors").exists() and not (out / "curves.png").exists()


# --- Trackers: names and packages -----------------------------------------------------------------

def refused(*arguments):
    with pytest.raises(UserError) as caught:
        flags.parse_args(["--model=none", "--dataset=none", *arguments])
    return str(caught.value)


@pytest.mark.parametrize("text", ["mlflow", "all", "wandb,,tensorboard", "none,wandb"])
def test_an_unknown_tracker_is_refused_with_the_names_of_those_that_exist(text):
    assert "give one of wandb, tensorboard" in refused(f"--report_to={text}")


@pytest.mark.parametrize("text, packages", [
    ("wandb", "wandb"), ("tensorboard", "tensorboard"), ("wandb,tensorboard", "wandb tensorboard"),
])
def test_a_missing_package_is_refused_with_its_pip_line_before_a_model_is_loaded(
        text, packages, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"not installed; pip install {packages}, or" in refused(f"--report_to={text}")


def test_wandb_without_a_key_is_refused_before_a_model_is_loaded(wandb, monkeypatch):
    def login():
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", login)
    assert refused("--report_to=wandb").endswith(
        "Use `wandb login` to log in. Or set WANDB_MODE=offline")


# --- Trackers: the rows ---------------------------------------------------------------------------

class FakeRun:
    """A run of W&B: a step that it has already is ignored, metrics of one step are merged."""

    def __init__(self, history):
        self.history, self.step = history, max(history, default=-1) + 1
        self.finished = False

    def log(self, values, step):
        assert not self.finished
        assert step >= max(self.history, default=0), "W&B would ignore this step"
        assert not set(values) - {"step"} & set(self.history.get(step, {})), "twice"
        self.history.setdefault(step, {}).update(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module that stands for wandb, and its server: `runs` has {id: {step: metrics}}."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", None)
    module.runs, module.starts = {}, []

    def init(**options):
        module.starts.append(options)
        return FakeRun(module.runs.setdefault(options["id"], {}))

    module.init, module.login, module.Settings = init, lambda: True, dict
    module.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def by_step(rows):
    """{step: {split/metric: value}} of rows of metrics.jsonl, without times."""
    named = {}
    for row in rows:
        for metric, value in row.items():
            if metric not in ("step", "split", "tokens_per_second"):
                name = trackers.tag(row["split"], metric)
                named.setdefault(row["step"], {})[name] = value
    return named


def without_times(history):
    kept = {}
    for step, values in history.items():
        kept[step] = {name: value for name, value in values.items()
                      if name not in ("step", "train/tokens_per_second")}
    return kept


def test_a_tracker_has_all_metrics_of_all_rows_and_the_flags_as_config(fit, wandb):
    out, rows = fit(report_to="wandb", **STEPS)
    history, = wandb.runs.values()
    assert without_times(history) == by_step(rows)
    assert {"train/loss", "eval/loss", "train/tokens_per_second"} <= history[6].keys()
    saved = json.loads((out / "config.json").read_text())["flags"]
    assert wandb.starts[0]["config"] == saved
    assert wandb.starts[0]["name"] == out.name


def test_the_metrics_of_the_world_keep_their_names():
    assert trackers.tag("world", "world/share") == "world/share"
    assert trackers.tag("eval", "rewards/margins") == "eval/rewards/margins"


@pytest.mark.parametrize("lost", [0, 1, 2, 3])
def test_a_killed_and_resumed_run_has_the_tracker_rows_of_an_uninterrupted_one(fit, wandb, lost):
    """Killed after step 4. W&B has got all rows, or it lost those of the last steps."""
    whole, _ = fit(report_to="wandb", out="whole", **STEPS)
    killed, _ = fit(report_to="wandb", out="killed", **STEPS)
    unfinished(killed)
    identity = (killed / "wandb" / "id.txt").read_text()
    for step in range(7 - lost, 7):
        del wandb.runs[identity][step]
    resume(killed)
    assert differences(whole, killed) == []
    uninterrupted, resumed = wandb.runs.values()
    assert without_times(resumed) == without_times(uninterrupted)
    assert [start["id"] for start in wandb.starts[1:]] == [identity, identity]


def test_a_tracker_that_a_resumed_run_adds_gets_the_whole_run(fit, wandb):
    out, _ = fit(**STEPS)
    resume(unfinished(out), "--report_to=wandb")
    history, = wandb.runs.values()
    assert without_times(history) == by_step(read_metrics(out))


def test_the_answers_of_each_sampled_step_are_a_table_also_after_a_kill(fit, wandb, monkeypatch):
    """Killed after step 4; step 3 was sampled before, between two rows of metrics."""
    forked.hide_matplotlib(monkeypatch.setitem)
    whole, _ = fit(report_to="wandb", log_every=2, out="whole", **STEPS, **SAMPLED)
    killed, _ = fit(report_to="wandb", log_every=2, out="killed", **STEPS, **SAMPLED)
    identity = (killed / "wandb" / "id.txt").read_text()
    del wandb.runs[identity][6]
    resume(unfinished(killed))
    uninterrupted, resumed = wandb.runs.values()
    assert without_times(resumed) == without_times(uninterrupted)
    assert sorted(uninterrupted) == [2, 3, 4, 6]
    for step in (3, 6):
        table = uninterrupted[step]["samples"]
        rows = [row for row in read_samples(whole) if row["step"] == step]
        assert len(table) == len(rows) == 2
        for cells, row in zip(table, rows):
            assert cells["prompt"] == row["prompt"] and cells["step"] == step
            assert cells["policy/text"] == row["policy"]["text"]
            assert cells["reference/reward"] == row["reference"]["reward"]


def test_an_answer_is_shown_as_it_is_and_not_as_markdown():
    row = {"id": "a", "prompt": "one\n\n# two", "policy": {"text": "```\n", "reward": 1.5}}
    assert trackers.as_markdown(row) == (
        'prompt a:\n\n    one\n    \n    # two\n\npolicy: `{"reward": 1.5}`\n\n    ```\n')


def test_a_resumed_run_may_report_to_nothing(fit, wandb):
    out, _ = fit(report_to="wandb", **STEPS)
    resume(unfinished(out), "--report_to=none")
    assert len(wandb.starts) == 1


def test_a_users_folder_of_the_same_name_is_kept_under_another_name(fit, wandb, capsys):
    out, _ = fit(**STEPS)
    (unfinished(out) / "wandb").mkdir()
    (out / "wandb" / "mine").write_text("mine")
    resume(out, "--report_to=wandb")
    assert (out / "wandb-2" / "mine").read_text() == "mine"
    assert not (out / "wandb" / "mine").exists()
    assert f"{out / 'wandb'} was not written by this run" in capsys.readouterr().out


def test_only_rank_0_reports(tmp_path, wandb):
    ranks = parallel.Ranks(1, 2, torch.device("cpu"))
    writer = log.Log(tmp_path, {"loss": "ipo", "report_to": "wandb"}, None, 0, 1, ranks)
    writer.row(1, "train", {"loss": 1.0})
    writer.close()
    assert wandb.starts == [] and list(tmp_path.iterdir()) == []


def test_the_trackers_may_be_changed_when_a_run_is_resumed():
    assert {"report_to", "push_to_hub"} <= checkpoint.FREE_ON_RESUME


# --- Trackers: the real packages ------------------------------------------------------------------

def scalars(folder):
    """{step: {tag: value}} as TensorBoard shows them. A step that is there twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    history = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            values = history.setdefault(event.step, {})
            assert name not in values
            values[name] = event.value
    return history


def shown_samples(folder):
    """{number of the prompt: [(step, text)]} as TensorBoard shows them."""
    # What reads the files for the web page; the class above drops no text that is sent again.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    shown = {}
    for number in (1, 2):
        shown[number] = []
        for event in events.Tensors(f"samples/{number}/text_summary"):
            text = event.tensor_proto.string_val[0].decode("utf-8")
            shown[number].append((event.step, text))
    return shown


def test_tensorboard_shows_a_killed_and_resumed_run_like_an_uninterrupted_one(fit):
    pytest.importorskip("tensorboard")
    whole, rows = fit(report_to="tensorboard", out="whole", **STEPS, **SAMPLED)
    killed, _ = fit(report_to="tensorboard", out="killed", **STEPS, **SAMPLED)
    resume(unfinished(killed))
    assert shown_samples(killed / "tensorboard") == shown_samples(whole / "tensorboard")
    assert shown_samples(whole / "tensorboard")[2] == [
        (row["step"], trackers.as_markdown(row)) for row in read_samples(whole)[1::2]]
    shown = without_times(scalars(whole / "tensorboard"))
    assert without_times(scalars(killed / "tensorboard")) == shown
    for step, values in by_step(rows).items():
        assert shown[step] == pytest.approx(values, rel=1e-6)
    assert len(list((killed / "tensorboard").iterdir())) == 2


def wandb_history(path):
    """{step: {name: value}} in a .wandb file: blocks of 32 KiB of records in LevelDB's format."""
    from wandb.proto import wandb_internal_pb2
    data, position, parts, history = path.read_bytes(), 7, b"", {}
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length = int.from_bytes(data[position + 4:position + 6], "little")
        kind = data[position + 6]
        parts += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                named = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                         for item in record.history.item}
                history.setdefault(record.history.step.num, {}).update(named)
    return history


def test_wandb_offline_has_the_rows_of_a_resumed_run_in_its_newest_folder(fit, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out, _ = fit(report_to="wandb", **STEPS, **SAMPLED)
    resume(unfinished(out))
    logs = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2 and len({path.name for path in logs}) == 1
    for path in logs:
        history = {}
        for step, values in wandb_history(path).items():
            history[step] = {name: value for name, value in values.items() if name[0] != "_"}
        # The parts of the entry about a table.
        parts = [name for name in history[6] if name.startswith("samples/")]
        tables = {}
        for step in (3, 6):
            tables[step] = {name: history[step].pop(name) for name in parts}
        assert without_times(history) == by_step(read_metrics(out))
        table = json.loads((path.parent / "files" / tables[6]["samples/path"]).read_text())
        cells = [dict(zip(table["columns"], row)) for row in table["data"]]
        expected = [row for row in read_samples(out) if row["step"] == 6]
        assert [row["policy/text"] for row in cells] == [row["policy"]["text"] for row in expected]


def test_the_readme_of_this_project_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert "python log.py" in text and "--report_to" in text
