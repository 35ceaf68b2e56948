"""The pictures: made by runs whose results are kept, by today's code, and true to their claims."""
import json
import math

import pytest
import torch

import experiments
import figures
import grounds
import pictures
import results
import world
from dpo import IGNORE, SequenceLogps
from experiments import EXPERIMENTS
from losses import LOSSES
from model import new_model
from pictures import CHOSEN, FORWARD_KL, MARGIN, REJECTED, last_of, numbers_of, with_settings
from tree import Language
from variants import length_weights

Image = pytest.importorskip("PIL.Image", reason="matplotlib, which draws, brings Pillow")
TOKENIZER = world.make_tokenizer()
TINY = world.MODEL | {"hidden_size": 8, "num_attention_heads": 1}
SHORTER = Language(world.WORDS[:3], 4, ends=True, shorter=True)


def tiny_ground(language=None):
    """A world whose reference is random."""
    language = language or Language()
    model = new_model(TOKENIZER, **TINY).double()
    truth = world.true_reward()
    if language.shorter:
        truth, = world.draw(1, (len(world.THINGS), len(language.lengths())))
    return grounds.make_ground(model, language, TOKENIZER, truth)


@pytest.fixture
def tiny_runs(monkeypatch):
    """Runs of two steps, from random references."""
    monkeypatch.setattr(experiments, "embedded_world", lambda ends=False: tiny_ground(
        Language(ends=ends)))
    monkeypatch.setattr(experiments, "small_world", lambda hidden_size: tiny_ground())
    monkeypatch.setattr(experiments, "length_world", lambda: tiny_ground(SHORTER))
    optimize = grounds.optimize

    def two_steps(parameters, objective, steps, **options):
        optimize(parameters, objective, 2, **options)

    monkeypatch.setattr(grounds, "optimize", two_steps)


def committed(name):
    return figures.rows_of(name)


# --- The tree -------------------------------------------------------------------------------------

def padded_logps(model, language):
    """Log-probs of the answers to the first prompt, each one a row of its own."""
    prompt = TOKENIZER(world.prompts()[0])["input_ids"]
    words = TOKENIZER.convert_tokens_to_ids(list(language.vocabulary))
    rows = []
    for count in sorted(set(language.lengths().tolist())):
        for answer in torch.cartesian_prod(*[torch.tensor(words)] * count).view(-1, count):
            rows.append(prompt + answer.tolist() + [TOKENIZER.eos_token_id] * language.ends)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[:, :len(prompt)] = IGNORE
    with torch.no_grad():
        return SequenceLogps(model)(labels, input_ids=ids, attention_mask=mask), labels


@pytest.mark.parametrize("language", [
    Language(world.WORDS[:3]), Language(world.WORDS[:3], ends=True), SHORTER,
], ids=["no-eos", "eos", "lengths"])
def test_the_tree_gives_each_answer_the_log_prob_that_it_has_as_a_row_of_its_own(language):
    ground = tiny_ground(language)
    (logps, lengths), _ = padded_logps(ground.model, language)
    assert torch.allclose(ground.reference[0], logps, atol=1e-12)
    assert torch.equal(lengths, language.lengths() + language.ends)


def test_ld_dpo_in_the_tree_weighs_tokens_as_train_py_does():
    ground = tiny_ground(SHORTER)
    (_, _), labels = padded_logps(ground.model, SHORTER)
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randint(len(labels), (2, 200), generator=generator)
    pairs = grounds.Pairs(torch.zeros_like(chosen), chosen, rejected)
    with torch.no_grad():
        _, sides = grounds.side_logps_of(ground, pairs, 0.3)(ground.model)

        # The same pairs as padded rows, token by token.
        prompt = torch.tensor(TOKENIZER(world.prompts()[0])["input_ids"])
        both = torch.cat([chosen, rejected])
        ids = labels[both].clamp(min=0)
        ids[:, :len(prompt)] = prompt
        logps = ground.model(input_ids=ids).logits.log_softmax(-1)[:, :-1]
        tokens = logps.gather(-1, ids[:, 1:, None])[..., 0]
        weights = length_weights(labels[both][:, 1:], 0.3)
        scored = labels[both][:, 1:] != IGNORE
        expected = (tokens * weights * scored).sum(-1)
    assert torch.allclose(torch.cat(sides), expected, atol=1e-12)


# --- Runs and their results -----------------------------------------------------------------------

SPECIAL = ("optimum", "ld_dpo", "robust", "sigmoid,sft")  # losses with code of their own


def kinds_of_runs():
    """The first settings of each kind: each cause, each kind of pairs, each special loss."""
    kinds = {}
    for name, experiment in EXPERIMENTS.items():
        for settings in experiment.plan():
            kind = [settings.get(key) for key in ("cause", "pairs", "off_policy")]
            kind.append(settings.get("loss") in SPECIAL and settings["loss"])
            kinds.setdefault((name, *map(str, kind)), settings)
    return [(name, settings) for (name, *_), settings in kinds.items()]


def test_every_kind_of_run_gives_numbers_that_json_keeps(tiny_runs, monkeypatch):
    monkeypatch.setattr(grounds, "PAIRS", 512)
    monkeypatch.setattr(experiments, "PAIRS", 512)
    monkeypatch.setattr(experiments, "NOISE_PAIRS", 512)
    monkeypatch.setattr(experiments.run_shared, "__defaults__", (2, 2, 0.02))  # count, steps, lr
    for name, settings in kinds_of_runs():
        result = experiments.short_numbers(EXPERIMENTS[name].run(settings))
        assert result == json.loads(json.dumps(result)), (name, settings)
        assert "NaN" not in json.dumps(result), (name, settings)
        assert set(result) == set(with_settings(committed(name), **settings)[0]["result"])


def test_no_policy_is_above_the_exact_frontier(tiny_runs):
    """max E[r] − β KL is β log Z, so a policy of KL k has at most β k + β log Z for each β."""
    ground = experiments.embedded_world()
    optimum = torch.tensor(experiments.optimal_frontier(), dtype=torch.float64)
    betas, kls, rewards = optimum.T
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 3.0):
        noise = torch.randn(ground.truth.shape, generator=generator, dtype=torch.float64)
        values = world.metrics(ground.reference + scale * noise, ground.reference, 1.0)
        # world.metrics takes the true reward of the world, and so does the frontier here.
        objective = values["world/reward"] - betas * values["world/kl"]
        assert (objective <= rewards - betas * kls + 1e-6).all()


def test_an_interrupted_command_continues_where_it_was(tmp_path):
    runs = []

    def run(settings):
        runs.append(settings["seed"])
        return {"value": settings["seed"]}

    plan = [{"seed": seed} for seed in range(3)]
    for settings in results.missing("name", plan, run, tmp_path)[:2]:
        results.append("name", settings, run, run(settings), tmp_path)
    with open(tmp_path / "name.jsonl", "a") as file:
        file.write('{"settings": {"seed": 2}, "co')  # killed within a line
    for settings in results.missing("name", plan, run, tmp_path):
        results.append("name", settings, run, run(settings), tmp_path)
    assert runs == [0, 1, 2]
    rows = results.ordered_results("name", plan[::-1], tmp_path)
    assert [row["result"]["value"] for row in rows] == [2, 1, 0]
    assert len((tmp_path / "name.jsonl").read_text().splitlines()) == 3


def test_a_result_counts_until_the_code_of_its_run_changes(monkeypatch):
    run, settings = experiments.run_frontier, {"loss": "sigmoid", "beta": 1.0, "seed": 0}
    before = results.code_digest(run, settings)
    assert results.code_digest(run, settings | {"loss": "ipo"}) != before
    monkeypatch.setattr(grounds.fit, "__defaults__", (None, 1.0, 61))  # the last is steps
    assert results.code_digest(run, settings) != before
    monkeypatch.undo()
    assert results.code_digest(run, settings) == before
    code = results.code_of(LOSSES["sigmoid"].__wrapped__)
    assert "Paper" not in code and "\n#" not in code and "softplus" in code


# --- What is committed ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_committed_results_are_those_of_todays_code(name):
    experiment = EXPERIMENTS[name]
    assert results.missing(name, experiment.plan(), experiment.run) == []


@pytest.mark.parametrize("name", figures.CATALOG)
def test_the_committed_pictures_are_drawn_by_todays_code_from_the_committed_results(name):
    for file, picture in figures.CATALOG[name].items():
        with Image.open(results.FOLDER / f"{file}.png") as image:
            digest = figures.drawing_digest(picture.draw, committed(name))
            assert image.text["Description"] == digest
            assert image.width <= 1200


def test_the_page_has_the_numbers_of_the_committed_results():
    assert figures.PAGE.read_text(encoding="utf-8") == figures.page()


def test_results_and_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in results.FOLDER.iterdir()}
    assert sum(size for name, size in sizes.items() if name.endswith(".jsonl")) < 300_000
    assert max(size for name, size in sizes.items() if name.endswith(".png")) < 150_000


@pytest.mark.parametrize("name", figures.CATALOG)
def test_a_picture_is_drawn_from_the_results_alone(name):
    for picture in figures.CATALOG[name].values():
        figure = picture.draw(committed(name))
        assert all(panel.lines or panel.collections for panel in figure.axes)
        assert figure.get_supxlabel() or any(panel.get_xlabel() for panel in figure.axes)


# --- What the pictures claim ----------------------------------------------------------------------

def test_every_run_is_below_the_exact_frontier():
    rows = committed("frontier")
    betas, kls, rewards = pictures.optimum_of(rows)
    for row in rows:
        if row["settings"]["loss"] != "optimum":
            objective = row["result"]["reward"] - betas * row["result"]["kl"]
            # The numbers are short_numbers to 4 digits.
            assert (objective <= rewards - betas * kls + 0.02).all()


def test_the_implicit_reward_of_dpo_is_the_true_reward():
    rows = committed("theorem")
    assert numbers_of(rows, "correlation").min() > 0.97
    assert numbers_of(rows, "slope").min() > 0.9
    implicit = pictures.implicit_rewards(rows)
    correlation = torch.nn.functional.cosine_similarity(implicit, world.true_reward(), dim=-1)
    assert correlation.mean().item() == pytest.approx(rows[0]["result"]["correlation"], abs=1e-3)


def test_chosen_and_rejected_fall_together_by_the_forward_kl():
    """Where both answers of a pair are samples of π_ref, the mean of all changes is
    E_ref[log π − log π_ref] = −KL(π_ref || π). A pair has two different answers, hence the 5 %."""
    for loss in experiments.BOTH_FALL:
        rows = with_settings(committed("both_fall"), loss=loss)
        both = (last_of(rows, CHOSEN) + last_of(rows, REJECTED)) / 2
        assert torch.allclose(both, -last_of(rows, FORWARD_KL), rtol=0.05, atol=0.02), loss


def test_the_margin_of_ipo_stops_and_that_of_dpo_grows():
    for beta in (0.25, 1.0):
        rows = with_settings(committed("overfitting"), loss="ipo", beta=beta)
        target = torch.tensor(pictures.target_of_ipo(beta), dtype=torch.float64)
        assert torch.allclose(last_of(rows, MARGIN), target, rtol=0.02)
        rows = with_settings(committed("overfitting"), loss="sigmoid", beta=beta)
        curves = numbers_of(rows, "curve")[:, :, MARGIN]
        assert (curves[:, -1] > curves[:, -4]).all() and (curves[:, -4] > curves[:, -7]).all()


def test_a_pair_that_starts_at_the_reference_ends_wrong_with_discopop():
    _, push, _ = pictures.loss_of_margin("discopop", torch.zeros(1))
    assert push.item() < 0
    for loss, sign in (("discopop", -1), ("sigmoid", 1)):
        paths = numbers_of(with_settings(committed("start"), loss=loss), "path")
        assert (paths[:, -1].sign() == sign).all()


def test_every_loss_of_pairs_has_a_finite_curve():
    for name in pictures.losses_of_margin():
        for numbers in pictures.loss_of_margin(name, torch.tensor([-3.0, 0.0, 3.0])):
            assert all(math.isfinite(number) for number in numbers), name


def test_the_page_of_the_losses_is_made_by_figures_py_too(monkeypatch):
    written = []
    monkeypatch.setattr(figures.book, "write_book", lambda: written.append("page"))
    monkeypatch.setattr(figures, "make_figures", written.append)
    figures.main(["book"])
    figures.main(["book", "start"])
    assert written == ["page", "page", ["start"]]
