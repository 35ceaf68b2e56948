"""docs/losses.html: it has the formulas, the curves and the code of losses.py, and works in a
browser."""
import html.parser
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import mathml
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT

import book
import curves
import formulas
from card import docstring_section
from registry import (
    LOSSES,
    hyperparameters,
    kind_of,
    table,
    tensor_arguments,
)

NAMES = [name for name in LOSSES if name == LOSSES[name].__name__]
NAMES_ON_PAGE = re.findall(r"^\| `(\w+)`", "\n".join(table()), re.M)
PATH = ROOT / "docs" / "losses.html"
PAGE = PATH.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sweeps():
    return {name: curves.sweep_loss(LOSSES[name]) for name in NAMES}


@pytest.fixture(scope="module")
def made(sweeps):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(book, "sweep_loss", lambda function: sweeps[function.__name__])
        return book.make_page()


# --- The committed page ---------------------------------------------------------------------------

CURVES = re.compile(r'"([^"|]*\|[\w-]*)"')  # in the data of the sliders
DRAWN = re.compile(r"(?<=M)\d+,[\d., ]+")  # the points of a drawn curve


def test_the_page_is_what_the_code_makes(made):
    """Drawn and stored values may differ by their rounding, everything else is equal."""
    if made == PAGE:
        return
    for pattern in (CURVES, DRAWN):
        assert len(pattern.findall(made)) == len(pattern.findall(PAGE))
    left, right = (DRAWN.sub("", CURVES.sub("", text)) for text in (made, PAGE))
    assert left == right, "run `python book.py`"
    for new, old in zip(CURVES.findall(made), CURVES.findall(PAGE)):
        assert new.partition("|")[0] == old.partition("|")[0]
        new, old = curves.decode_curves(new, 1), curves.decode_curves(old, 1)
        torch.testing.assert_close(new, old, rtol=0, atol=3e-3 * (new.max() - new.min()).item())
    for new, old in zip(DRAWN.findall(made), DRAWN.findall(PAGE)):
        new, old = (torch.tensor([float(each) for each in re.split("[, ]", text)])
                    for text in (new, old))
        torch.testing.assert_close(new, old, rtol=0, atol=1.0)


def test_the_command_writes_the_page(tmp_path, monkeypatch, made, capsys):
    monkeypatch.setattr(sys, "argv", ["book.py", "--out", str(tmp_path / "page.html")])
    monkeypatch.setattr(book, "make_page", lambda: made)
    book.main()
    assert (tmp_path / "page.html").read_bytes() == made.encode()
    assert "page.html" in capsys.readouterr().out


def test_the_page_has_less_than_a_megabyte_and_a_half():
    assert PATH.stat().st_size < 1.5e6


class Reader(html.parser.HTMLParser):
    """Checks that tags match, and collects ids, links, and the text of each code and of math."""
    VOID = {"meta", "input", "br", "!doctype"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.attributes = [], [], [], []
        self.code, self.article = {}, None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if "id" in named:
            self.ids.append(named["id"])
        if tag == "a":
            self.links.append(named["href"])
        if tag == "article":
            self.article = named["id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.code[self.article] = self.code.get(self.article, "") + data


@pytest.fixture(scope="module")
def reader():
    return Reader(PAGE)


def test_every_link_inside_the_page_has_one_target(reader):
    assert len(reader.ids) == len(set(reader.ids))
    inside = [link[1:] for link in reader.links if link.startswith("#")]
    assert set(LOSSES) - set(reader.ids) == set()  # older names too
    assert set(inside) <= set(reader.ids)
    outside = [link for link in reader.links if not link.startswith("#")]
    assert all(link.startswith("https://") for link in outside)


def test_the_page_loads_nothing(reader):
    loading = [each for each in reader.attributes if each[1] in ("src", "srcset", "data", "action")]
    assert loading == []
    assert {tag for tag, name, _ in reader.attributes if name == "href"} == {"a"}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", PAGE)


def test_the_losses_are_in_the_order_and_the_groups_of_the_table():
    rows = re.findall(r"^(?:\*\*(.+)\*\*|\| `(\w+)` .*)$", "\n".join(table()), re.M)
    parts = re.findall(r'<h2>(.+)</h2>\n|<article id="(\w+)"', PAGE[PAGE.index("<main"):])
    assert parts == rows
    assert sorted(name for _, name in rows if name) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_papers_the_ranges_and_what_other_code_does(name):
    start = PAGE.index(f'<article id="{name}"')
    shown = PAGE[start:PAGE.index("</article>", start)]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", shown))
    for section in ("Elsewhere", "Gradient", "Args"):
        words = docstring_section(LOSSES[name], section).replace("`", "").split()
        assert " ".join(words) in text.replace("&lt;", "<").replace("&gt;", ">"), section
    for number in re.findall(r"arXiv:(\d+\.\d+)", docstring_section(LOSSES[name], "Paper")):
        assert f"https://arxiv.org/abs/{number}" in shown
    for parameter, default in hyperparameters(LOSSES[name]).items():
        value = "none" if default is None else f"{default:g}"
        assert re.search(rf"<code>{parameter}</code></th><td>{value}</td><td>[^<]+</td>", shown)


# --- Code -----------------------------------------------------------------------------------------

def example(name, count=4):
    """Tensors in float64 for a call of a loss. No two of them are equal."""
    generator = torch.Generator().manual_seed(NAMES.index(name))
    shape = (count, 3) if kind_of(LOSSES[name]) == "lists" else (count,)
    tensors = {}
    for argument in tensor_arguments(LOSSES[name]):
        noise = torch.rand(shape, generator=generator, dtype=torch.float64)
        if argument.endswith("logps"):
            tensors[argument] = -4 - 4 * noise
        elif argument.endswith("lengths"):
            tensors[argument] = 4 + torch.floor(8 * noise)
        elif argument.endswith("scores"):
            tensors[argument] = noise + ("chosen" in argument)
        elif argument == "labels":
            tensors[argument] = torch.arange(count) % 2 == 0
        elif argument == "mask":
            tensors[argument] = torch.ones(shape, dtype=torch.bool)
    return tensors


def run_alone(code, name):
    """Run copied code in an empty namespace, and return the function."""
    namespace = {"__name__": "copied"}
    exec(compile(code, "copied", "exec"), namespace)
    return namespace[name]


def value_and_slopes(function, tensors):
    leaves = {name: value.clone().requires_grad_() for name, value in tensors.items()
              if name.startswith("policy")}
    value = function(**tensors | leaves)
    return [value, *torch.autograd.grad(value.sum(), list(leaves.values()))]


@pytest.mark.parametrize("name", NAMES)
def test_the_code_on_the_page_runs_alone_and_gives_the_loss_and_its_gradient(name, reader):
    code = reader.code[name]
    assert code == book.runnable_code(name)
    assert set(re.findall(r"^(?:import|from) (\w+)", code, re.M)) <= {"torch"}
    copied = run_alone(code, name)
    tensors = example(name)
    for left, right in zip(value_and_slopes(copied, tensors),
                           value_and_slopes(LOSSES[name], tensors)):
        assert torch.equal(left, right)


def test_copied_code_has_the_helpers_and_imports_that_it_uses_and_no_others():
    assert re.findall(r"^def (\w+)", book.runnable_code("chipo"), re.M) == ["chipo", "capped_exp"]
    assert book.runnable_code("sppo_hard").startswith("def sppo_hard(")
    assert "torch.nn" not in book.runnable_code("ipo")
    assert "@loss" not in book.runnable_code("sigmoid")
    assert "update" not in book.runnable_code("bco_pair").split('"""')[2]


def test_highlighting_marks_code_and_changes_no_character():
    code = 'def f(x):\n    """Doc <b>."""\n    return x + 1  # why & how\n'
    marked = book.highlight(code)
    assert '<span class="d">f</span>' in marked
    assert '<span class="c"># why &amp; how</span>' in marked
    assert Reader(f"<pre>{marked}</pre>").code[None] == code


# --- Formulas -------------------------------------------------------------------------------------

def test_no_formula_is_left_as_plain_text():
    for name in NAMES:
        assert "<pre" not in formulas.typeset(docstring_section(LOSSES[name], "Formula")), name


def test_a_formula_with_an_unknown_character_is_shown_as_it_is():
    for text in ("L = ∮ w < l", "L = (w", "L = w)", "L = /w", "L = w^", "L = w_+"):
        escaped = text.replace("<", "&lt;")
        assert formulas.typeset(text) == f'<pre class="plain">{escaped}</pre>'


@pytest.mark.parametrize("text, tags", [
    ("a/b", "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>"),
    ("x_w", "<msub><mi>x</mi><mrow><mi>w</mi></mrow></msub>"),
    ("x²", "<msup><mi>x</mi><mrow><mn>2</mn></mrow></msup>"),
    ("Σ_k", "<munder><mo>∑</mo><mrow><mi>k</mi></mrow></munder>"),
    ("h\u0304", '<mover accent="true"><mi>h</mi><mo stretchy="false">¯</mo></mover>'),
])
def test_fractions_scripts_sums_and_bars_are_typeset(text, tags):
    assert f"<mrow>{tags}</mrow></math>" in formulas.typeset(text)


def test_a_slash_with_spaces_divides_the_whole_product():
    wide, tight = formulas.typeset("a b / c d"), formulas.typeset("a b/c d")
    assert ElementTree.fromstring(wide).find(".//mfrac")[0].find("mi").text == "a"
    assert ElementTree.fromstring(tight).find(".//mfrac")[0].find("mi").text == "b"


# What a Greek letter or another symbol of a formula is, where that is no common symbol.
SYMBOLS = {
    "ipo": {"τ": "beta"}, "discopop": {"τ": "discopop_tau"}, "rdpo": {"α": "rdpo_alpha"},
    "odpo": {"α": "odpo_alpha"}, "score_margin": {"κ": "margin_kappa"},
    "rpo_sq": {"η": "rpo_eta"}, "rpo_bwd_kl": {"η": "rpo_eta"}, "rpo_fwd_kl": {"η": "rpo_eta"},
    "dpop": {"λ": "dpop_lambda"}, "dpo_shift": {"λ": "shift_lambda"}, "bpo": {"α": "bpo_alpha"},
    "bpo_hinge": {"α": "bpo_alpha"}, "cal_dpo": {"c": "cal_dpo_weight"},
    "chipo": {"R": "chipo_r_max"}, "beta_dpo": {"α": "beta_dpo_a", "M": "gap_mean"},
    "alpha_dpo": {"α": "alpha_dpo_alpha", "γ": "gamma", "μ": "gap_mean", "s": "gap_std"},
    "dr_dpo": {"β_prime": "dr_beta"}, "cpo": {"α": "cpo_alpha"},
    "simpo": {"α": "cpo_alpha", "γ": "gamma"}, "alphapo": {"α": "alphapo_alpha", "γ": "gamma"},
    "repo": {"γ": "repo_gamma"}, "orpo": {"λ": "beta"},
    "slic": {"δ": "slic_delta", "λ": "slic_lambda"},
    "kto": {"λ_D": "desirable_weight", "λ_U": "undesirable_weight", "kl": "kl"},
    "apo_zero_unpaired": {"λ_D": "desirable_weight", "λ_U": "undesirable_weight"},
    "bco": {"δ": "delta"}, "bco_pair": {"δ": "delta"},
    "infonca": {"α": "nca_alpha"}, "nca": {"α": "nca_alpha"}, "exo": {"β_r": "exo_beta_r"},
}
# Values at which no term of a formula is 0. The others are the defaults.
CHANGED = {
    "label_smoothing": 0.2, "cpo_alpha": 0.7, "delta": 0.3, "kl": 0.4, "gap_mean": 0.2,
    "gap_std": 1.3, "chipo_r_max": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.6,
}


def common_symbols(tensors, named):
    """The symbols that losses.py defines for all formulas."""
    given = {"β": named.get("beta"), "ε": named.get("label_smoothing"), "η": None}
    names = {"w": "policy_chosen_logps", "l": "policy_rejected_logps",
             "w_ref": "ref_chosen_logps", "l_ref": "ref_rejected_logps",
             "n_w": "chosen_lengths", "n_l": "rejected_lengths",
             "s_w": "chosen_scores", "s_l": "rejected_scores", "s": "scores"}
    given |= {symbol: tensors[name] for symbol, name in names.items() if name in tensors}
    for answer, ratio in (("w", "a"), ("l", "b")):
        if f"{answer}_ref" in given:
            given[ratio] = given[answer] - given[f"{answer}_ref"]
            given[f"r_{answer}"] = named["beta"] * given[ratio]
        if f"n_{answer}" in given and answer in given:
            given[f"{answer}_bar"] = given[answer] / given[f"n_{answer}"]
    if "a" in given and "b" in given:
        given["h"] = given["a"] - given["b"]
        if "n_w" in given:
            given["h_bar"] = given["a"] / given["n_w"] - given["b"] / given["n_l"]
    if "n_w" in given:
        given["n_bar"] = given["n_w"].mean()
    if "policy_logps" in tensors:
        given |= {"r": named["beta"] * (tensors["policy_logps"] - tensors["ref_logps"]), "K": 3}
    return given


def special_symbols(name, tensors, given, named):
    """The symbols of one formula."""
    target = tensors.get("policy_target_logps")
    special = {symbol: named[parameter] for symbol, parameter in SYMBOLS.get(name, {}).items()}
    if name == "sppo_hard":
        special["η"] = 1 / named["beta"]
    if name == "sft":
        special["w_i"] = given["w"]
    if name == "slic":
        special |= {"y_ref": None, "x": None, "π": lambda y, x: target.exp()}
    if name == "npo":
        special |= {"π": given["b"].exp(), "π_ref": 1.0}
    if name.startswith("aot"):
        special |= {"k": None, "at": lambda sorted_values, k: sorted_values}
    return special


@pytest.mark.parametrize("name", NAMES)
def test_the_typeset_formula_has_the_value_of_the_loss(name):
    """The MathML is evaluated as arithmetic: its fractions, scripts, sums and functions."""
    function, tensors = LOSSES[name], example(name)
    named = dict(hyperparameters(function))
    accepted = {*tensor_arguments(function), *named}
    named |= {key: value for key, value in CHANGED.items() if key in accepted}
    expected = function(**tensors, **named)
    given = common_symbols(tensors, named)
    given |= special_symbols(name, tensors, given, named)
    found = mathml.equations(formulas.typeset(docstring_section(function, "Formula")))
    values = mathml.loss_values(found, given)
    assert values
    for left, value in values:
        rows = slice(None)
        if left in ("L_D", "L_U"):
            rows = tensors["labels"] == (left == "L_D")
        value = value.expand_as(expected)
        torch.testing.assert_close(value[rows], expected[rows], rtol=1e-10, atol=1e-12)


# --- Curves ---------------------------------------------------------------------------------------

def test_the_curves_of_dpo_are_those_of_its_equation(sweeps):
    """−log σ(βh), and β σ(−βh) up for the chosen and down for the rejected answer."""
    sweep = sweeps["sigmoid"]
    h = torch.linspace(-60, 60, 81, dtype=torch.float64)
    index = 0
    for beta in sweep.betas:
        for smoothing in sweep.smoothings:
            loss, push = sweep.planes[index]
            index += 1
            z = beta * h
            torch.testing.assert_close(loss[0], torch.log1p(torch.exp(-z)) + smoothing * z)
            slope = beta * (torch.sigmoid(-z) - smoothing)
            torch.testing.assert_close(push, torch.stack([slope, -slope]))
    assert sweep.betas[0] == 0.01 and sweep.betas[-1] == 1.0 and 0.1 in sweep.betas
    assert sweep.smoothings == [i / 20 for i in range(10)]


def test_the_curves_of_a_loss_without_reference_have_its_own_margin(sweeps):
    """RePO: max(0, γ − (w̄ − l̄)) pushes by 1/n_w and 1/n_l until the margin is reached."""
    loss, push = sweeps["repo"].planes[0]
    margin = torch.linspace(-1.9, 1.9, 81, dtype=torch.float64)
    torch.testing.assert_close(loss[0], (0.6 - margin).clamp(min=0))
    reached = (margin < 0.6).double()
    torch.testing.assert_close(push, torch.stack([reached / 30, -reached / 20]))


def test_a_batch_loss_with_one_moving_pair_is_the_mean_over_the_batch(sweeps):
    """Dr. DPO at β′ = 1: the mean of e^(−d) is that of σ(βh) over the four pairs."""
    loss, push = sweeps["dr_dpo"].planes[sweeps["dr_dpo"].start]
    z = torch.linspace(-6, 6, 81, dtype=torch.float64)
    others = torch.tensor([-2.0, -1.0, 1.0], dtype=torch.float64).sigmoid().sum()
    total = z.sigmoid() + others
    torch.testing.assert_close(loss[0], -torch.log(total / 4))
    slope = 4 * 0.1 * z.sigmoid() * (-z).sigmoid() / total
    torch.testing.assert_close(push, torch.stack([slope, -slope]))


@pytest.mark.parametrize("name", NAMES)
def test_a_straight_line_between_two_points_of_a_curve_is_right_but_for_jumps(name, sweeps):
    sweep, function = sweeps[name], LOSSES[name]
    middles = torch.linspace(-sweep.radius, sweep.radius, 161, dtype=torch.float64)[1::2]
    at_middles = curves.compute_curves(function, middles, {})
    for drawn, exact in zip(sweep.planes[sweep.start], at_middles):
        between = (drawn[:, 1:] + drawn[:, :-1]) / 2
        ticks = curves.choose_ticks(drawn)
        error = (between - exact).abs() / (ticks[-1] - ticks[0])
        jumps = error > 0.02  # of a gradient: between two points, or half at a point
        assert jumps.sum(dim=1).max() <= 2
        assert error.median() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_stored_curves_are_the_computed_ones_within_a_four_thousandth_of_the_axis(name, sweeps):
    sweep = sweeps[name]
    for panel in sweep.planes[sweep.start]:
        text = curves.encode_curves(panel)
        ticks = curves.choose_ticks(panel)
        atol = 0.51 / curves.LEVELS * (ticks[-1] - ticks[0])
        torch.testing.assert_close(curves.decode_curves(text, len(panel)), panel, rtol=0, atol=atol)
        assert f'"{text}"' in PAGE or not sweep.betas
        assert ticks[0] <= panel.min() + 1e-9 and panel.max() - 1e-9 <= ticks[-1]
        assert 0 in ticks and 2 <= len(ticks) <= 5


def test_noise_in_the_last_bits_changes_no_stored_curve():
    h = torch.linspace(-60, 60, 81, dtype=torch.float64)
    curve = torch.relu(1 - 0.1 * h)[None]
    for noise in (3e-16, -3e-16):
        assert curves.encode_curves(curve * (1 + noise)) == curves.encode_curves(curve)


# --- In a browser ---------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    not CHROMIUM or not shutil.which("bash"), reason="there is no Chromium")


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


def drawn_heights(browser, name, panel):
    """The vertical positions of the curves of a panel at the stop of the slider: smaller is
    higher. The pale default is left out."""
    return browser.evaluate(f"""
        [...document.querySelectorAll('#{name} svg')[{panel}].querySelectorAll('.moving > .curve')]
        .map(path => path.getAttribute('d').slice(1).split(' ').map(p => +p.split(',')[1]))""")


def move_slider(browser, name, kind, key, times):
    browser.evaluate(f"document.querySelector('#{name} .{kind}').focus()")
    for _ in range(times):
        browser.press(key)


@needs_browser
def test_the_slider_for_beta_moves_the_curve_by_keys_and_back(browser):
    """A larger β makes the hinge steeper: its push is β, and its corner 1/β comes nearer."""
    browser.open(PATH)
    inner = "document.querySelector('#hinge .moving').innerHTML"
    before = browser.evaluate(inner)
    assert len(drawn_heights(browser, "hinge", 0)) == 1
    move_slider(browser, "hinge", "beta", "ArrowRight", 3)
    assert browser.evaluate("document.querySelector('#hinge output').textContent") == "0.316"
    assert browser.evaluate(inner) != before
    assert browser.evaluate("document.querySelectorAll('#hinge .before .curve').length") == 3
    heights, = drawn_heights(browser, "hinge", 0)
    assert heights.index(max(heights)) == 43  # h = 4.5, the first point above 1/β = 3.16
    ticks = browser.evaluate("[...document.querySelectorAll('#hinge svg')[1].querySelectorAll"
                             "('.moving .last')].map(each => each.textContent)")
    assert ticks == ["−0.4", "−0.2", "0", "0.2", "0.4"]
    move_slider(browser, "hinge", "beta", "ArrowLeft", 3)
    assert browser.evaluate(inner) == before
    assert browser.errors == []


@needs_browser
def test_label_smoothing_raises_the_loss_of_right_pairs_and_turns_their_push(browser):
    browser.open(PATH)
    chosen, rejected = drawn_heights(browser, "sigmoid", 1)
    assert chosen[-1] <= rejected[-1]  # the chosen answer is still pushed up at βh = 6
    move_slider(browser, "sigmoid", "smoothing", "ArrowRight", 4)
    chosen, rejected = drawn_heights(browser, "sigmoid", 1)
    assert chosen[-1] > rejected[-1]  # σ(6) > 1 − 0.2: it is pushed down
    loss, = drawn_heights(browser, "sigmoid", 0)
    lowest = loss.index(max(loss))
    assert lowest == 49  # log(0.8/0.2)/β = 13.9: between x = 13.5 and 15
    browser.evaluate("document.querySelector('#sigmoid .reset').click()")
    assert browser.evaluate("document.querySelector('#sigmoid .smoothing').value") == "0"


@needs_browser
def test_the_script_draws_what_python_draws(browser):
    browser.open(PATH)
    for name in ("sigmoid", "sppo_hard", "plackett_luce", "kto", "npo"):
        same = browser.evaluate(f"""(() => {{
            const before = [...document.querySelectorAll('#{name} .moving')].map(g => g.innerHTML);
            const slider = document.querySelector('#{name} .beta');
            slider.dispatchEvent(new Event('input'));
            const after = [...document.querySelectorAll('#{name} .moving')].map(g => g.innerHTML);
            return before.length === 2 && before.every((text, k) => text === after[k]);
        }})()""")
        assert same, name


@needs_browser
@pytest.mark.parametrize("name", ["chipo", "exo"])
def test_the_copy_button_copies_code_that_runs_alone(browser, name):
    browser.open(PATH)
    browser.send("Browser.grantPermissions",
                 permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.evaluate(f"document.querySelector('#{name} .copy').focus()")
    browser.press("Enter")
    text = browser.evaluate("new Promise(done => setTimeout(done, 50))"
                            ".then(() => navigator.clipboard.readText())")
    copied, tensors = run_alone(text, name), example(name)
    assert torch.equal(copied(**tensors), LOSSES[name](**tensors))
    assert browser.evaluate(f"document.querySelector('#{name} .copy').textContent") == "Copied"


SHOWN = "[...document.querySelectorAll('article')].filter(e => e.offsetHeight).map(e => e.id)"


@needs_browser
def test_search_shows_the_losses_that_have_every_word(browser):
    browser.open(PATH)
    assert browser.evaluate(SHOWN) == NAMES_ON_PAGE
    browser.press("/")  # focuses the search box
    for key in "sdpo":
        browser.press(key)
    assert browser.evaluate(SHOWN) == ["softmax_dpo"]  # by its older name
    assert browser.evaluate("document.querySelector('#found').textContent") == "1 loss"
    browser.press("Escape")
    assert browser.evaluate(SHOWN) == NAMES_ON_PAGE
    for text, names in (("2405.14734", ["simpo"]), ("average reference-free", None),
                        ("no such word", [])):
        browser.evaluate(f"show('{text}')")
        if names is None:
            names = [name for name in NAMES_ON_PAGE if "average" in LOSSES[name].tags
                     and "reference-free" in book.tags_of(LOSSES[name])]
            assert "simpo" in names and "ipo" not in names
        assert browser.evaluate(SHOWN) == names
        links = browser.evaluate("[...document.querySelectorAll('#index a')]"
                                 ".filter(e => e.offsetHeight).map(e => e.dataset.loss)")
        assert links == names
    browser.evaluate("location.hash = '#sigmoid'; new Promise(done => setTimeout(done, 50))")
    assert "sigmoid" in browser.evaluate(SHOWN)  # a link to a hidden loss ends the search


@needs_browser
def test_the_button_switches_between_light_and_dark(browser):
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(PATH, dark=True)
    browser.evaluate("localStorage.clear(); delete document.documentElement.dataset.theme")
    dark = browser.evaluate(paper)
    browser.open(PATH, dark=False)
    light = browser.evaluate(paper)
    assert dark != light
    browser.evaluate("document.querySelector('#theme').click()")
    assert browser.evaluate(paper) == dark
    browser.evaluate("document.querySelector('#theme').click(); localStorage.clear()")
    assert browser.evaluate(paper) == light


@needs_browser
@pytest.mark.parametrize("width", [1280, 375, 320])
def test_nothing_is_wider_than_the_screen(browser, width):
    """Code and formulas scroll in their own boxes, and no label of a plot is cut off."""
    browser.open(PATH, width=width, height=800)
    browser.evaluate("document.querySelector('#symbols').open = true")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    wide = browser.evaluate("""[...document.querySelectorAll('body *:not(.skip)')]
        .filter(e => !e.closest('pre, .formula') && e.getBoundingClientRect().right > innerWidth)
        .map(e => e.outerHTML.slice(0, 80))""")
    assert wide == []
    cut = browser.evaluate("""[...document.querySelectorAll('svg text')].filter(e => {
        const box = e.closest('svg').getBoundingClientRect(), own = e.getBoundingClientRect();
        return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1;
        }).map(e => e.textContent)""")
    assert cut == []


@needs_browser
def test_everything_can_be_reached_by_the_tab_key(browser):
    """In the order of the page: skip link, search, theme, and in a loss its link, sliders, code."""
    browser.open(PATH)
    browser.evaluate("show('discopop'); document.activeElement.blur(); scrollTo(0, 0)")
    browser.evaluate("document.querySelector('.skip').focus()")
    seen = []
    for _ in range(14):
        seen.append(browser.evaluate(
            "(e => e.id || e.className || e.tagName.toLowerCase() + ' ' + "
            "(e.getAttribute('href') || ''))(document.activeElement)"))
        browser.press("Tab")
    wanted = ["skip", "search", "theme", "a #discopop", "tag", "beta", "copy", "pre "]
    positions = [seen.index(each) for each in wanted]
    assert positions == sorted(positions), seen
    assert browser.evaluate("document.querySelector('#discopop svg').ariaLabel")
