"""Writes docs/losses.html: every loss on one page that needs no network.

    python book.py                        # writes docs/losses.html
    python book.py --out page.html

The page is made from losses.py alone: formula, papers and remarks from the docstrings, plots from
the functions, code from the source. `runnable_code` adds to the source of a loss the imports and
helpers that it uses, so that the text runs alone. book.html is the template, with the styles and
the script of the page; the script only draws curves that curves.py computed.

The same losses.py gives the same bytes, whatever the version of torch.
"""
from errors import Parser, run_script  # first, see errors.py
import ast
import functools
import html
import inspect
import io
import json
import keyword
import pathlib
import re
import tokenize
from collections.abc import Callable

import losses
from card import SYMBOLS, docstring_section
from curves import (
    STEPS,
    Sweep,
    axis_and_digits,
    decode_curves,
    encode_curves,
    sweep_loss,
    write_number,
)
from files import written_aside
from formulas import typeset
from registry import (
    LOSSES,
    describe_range,
    group_losses,
    hyperparameters,
    kind_of,
    needs_reference,
    needs_scores,
    start_state,
    tensor_arguments,
)

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE / "docs" / "losses.html"
TEMPLATE = HERE / "book.html"

TAGS = {  # of @loss, and what the page says of it
    "margin": "the log-probs enter through one margin alone",
    "average": "averages per token",
    "batch": "depends on the other pairs of the batch",
    "one_best": "reads which answer is the best, and no other order",
}
NOTES = {  # about a plot, by tag or kind
    "batch": "The pair is in a batch with three others, which stay at βh = −2, −1 and 1 for the "
             "default of β. The loss is the mean of the batch.",
    "labels": "An answer of 0 on the axis is as probable as under the reference.",
    "lists": "The log-ratios of y₂ and y₃ stay at 0.",
}


# --- Code -----------------------------------------------------------------------------------------

@functools.cache
def parse_losses() -> tuple[list[str], dict[str, ast.stmt]]:
    """Return the lines of losses.py, and {name: node} of its imports, functions and constants."""
    source = inspect.getsource(losses)
    definitions = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                definitions[alias.asname or alias.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node
    return source.splitlines(), definitions


def used_nodes(name: str) -> list[ast.stmt]:
    """Return the definitions that a function needs, itself too, in the order of losses.py."""
    _, definitions = parse_losses()
    nodes, waiting = {}, [name]
    while waiting:
        node = definitions[waiting.pop()]
        if node.lineno in nodes:
            continue
        nodes[node.lineno] = node
        for part in parts_without_decorators(node):
            for inner in ast.walk(part):
                if isinstance(inner, ast.Name) and inner.id in definitions:
                    waiting.append(inner.id)
    return [nodes[line] for line in sorted(nodes)]


def parts_without_decorators(node):
    if isinstance(node, ast.FunctionDef):
        return [node.args, *node.body]
    return [node]


def runnable_code(name: str) -> str:
    """Return the source of a loss without its @loss line, with the imports and helpers that it
    needs. Of its docstring, the sections Gradient and Elsewhere are left out."""
    lines, _ = parse_losses()
    imports, blocks = [], []
    for node in used_nodes(name):
        block = lines[node.lineno - 1:node.end_lineno]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports += block
        else:
            blocks.append("\n".join(drop_sections(block, ("Gradient", "Elsewhere"))))
    if imports:
        blocks.insert(0, "\n".join(imports))
    return "\n\n\n".join(blocks) + "\n"


def drop_sections(lines, names):
    """Drop sections of a docstring: a line that begins with a name, and all deeper lines below."""
    kept, dropping = [], False
    for line in lines:
        if line.startswith("    ") and not line.startswith("     "):
            dropping = line.split()[0] in names
        if not dropping:
            kept.append(line)
    return kept


def highlight(code: str) -> str:
    """Return code as HTML, with a class for keywords, strings, comments, numbers and the names of
    functions where they are defined."""
    lines = code.splitlines(keepends=True)
    parts, position, before = [], (1, 0), ""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        spaces = text_between(lines, position, token.start)
        text = escape(text_between(lines, token.start, token.end))
        style = token_style(token, before)
        if style:
            text = f'<span class="{style}">{text}</span>'
        parts += [spaces, text]
        position, before = token.end, token.string
    return "".join(parts)


def escape(text):
    return html.escape(text, quote=False)


def text_between(lines, start, end):
    """Return the text from one (row, column) to another."""
    (first, left), (last, right) = start, end
    if first > len(lines):
        return ""
    if first == last:
        return lines[first - 1][left:right]
    rows = [lines[first - 1][left:], *lines[first:last - 1]]
    if last <= len(lines):
        rows.append(lines[last - 1][:right])
    return "".join(rows)


def token_style(token, before):
    if token.type == tokenize.COMMENT:
        return "c"
    if token.type == tokenize.STRING:
        return "s"
    if token.type == tokenize.NUMBER:
        return "n"
    if token.type == tokenize.NAME and keyword.iskeyword(token.string):
        return "k"
    return "d" if before == "def" else ""


# --- Text -----------------------------------------------------------------------------------------

LINKS = re.compile(
    r"arXiv:(?P<number>\d+\.\d+)(?P<version>v\d+)?"
    r"|(?P<site>(?:github|huggingface|ericmitchell)\.(?:com|co|ai)/[\w./-]*\w)"
    r"|`(?P<code>[^`]+)`"
)


def write_prose(text: str) -> str:
    """Return a text of a docstring as HTML: papers and pages are links, names of losses too."""
    parts, position = [], 0
    for match in LINKS.finditer(text):
        before = text[position:match.start()]
        parts += [escape(before), write_link(match)]
        position = match.end()
    parts.append(escape(text[position:]))
    return "".join(parts)


def write_link(match):
    text, code = escape(match.group()), match["code"]
    if match["number"]:
        address = f"https://arxiv.org/abs/{match['number']}{match['version'] or ''}"
        return f'<a href="{address}">{text}</a>'
    if match["site"]:
        return f'<a href="https://{text}">{text}</a>'
    if code in LOSSES:
        return f'<a href="#{code}"><code>{code}</code></a>'
    return f"<code>{escape(code)}</code>"


def other_names(function: Callable) -> list[str]:
    """Return the older names of a loss."""
    names = [name for name, each in LOSSES.items() if each is function]
    names.remove(function.__name__)
    return names


def introduction(function: Callable) -> list[str]:
    """Return the paragraphs of a docstring before its first section."""
    paragraphs = inspect.getdoc(function).split("\n\n")
    first = [part.startswith("Paper ") for part in paragraphs].index(True)
    return [" ".join(part.split()) for part in paragraphs[:first]]


def tags_of(function: Callable) -> dict[str, str]:
    """Return {tag: what it means} of a loss, for the page and its search."""
    tags = {tag: meaning for tag, meaning in TAGS.items() if tag in function.tags}
    kind = kind_of(function)
    tags[kind] = f"takes {kind}"
    if needs_reference(function):
        tags["reference"] = "reads log-probs of a reference model"
    else:
        tags["reference-free"] = "reads no reference model"
    if needs_scores(function):
        tags["scores"] = "reads a score of each answer"
    if start_state(function):
        tags["state"] = "carries numbers from step to step"
    return tags


def write_tags(function):
    """Buttons that search for other losses with the tag."""
    buttons = []
    for tag, meaning in tags_of(function).items():
        buttons.append(f'<button type="button" class="tag" title="{meaning}">{tag}</button>')
    return " ".join(buttons)


def search_text(function: Callable) -> str:
    """Return what the search box looks through: names, first lines, papers, tags, flags."""
    words = [
        function.__name__,
        *other_names(function),
        *introduction(function),
        docstring_section(function, "Paper"),
        *tags_of(function),
        *tensor_arguments(function),
        *hyperparameters(function),
    ]
    text = " ".join(words).lower()
    return html.escape(" ".join(text.split()))


def write_hyperparameters(function):
    """A table of hyper-parameters, and what the docstring says about arguments."""
    rows = []
    for name, default in hyperparameters(function).items():
        value = "none" if default is None else f"{default:g}"
        bounds = html.escape(describe_range(function.ranges[name]))
        rows.append(f"<tr><th scope=row><code>{name}</code></th><td>{value}</td>"
                    f"<td>{bounds}</td></tr>")
    if not rows:
        return "<p>None.</p>"
    head = "<tr><th scope=col>name</th><th scope=col>default</th><th scope=col>range</th></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def paper_lines(function: Callable) -> list[str]:
    """Return the lines about the papers of a loss. A line of the docstring that is full continues
    in the next one."""
    lines, room = [], -1
    for line in docstring_section(function, "Paper").splitlines():
        if len(line.split()[0]) > room and lines:
            lines[-1] += " " + line
        else:
            lines.append(line)
        room = PAPER_COLUMNS - len(line) - 1
    return lines


PAPER_COLUMNS = 85  # of the text in a section of a docstring


def write_section(function, name, title):
    text = " ".join(docstring_section(function, name).split())
    return f"<h4>{title}</h4><p>{write_prose(text)}</p>"


# --- Plots ----------------------------------------------------------------------------------------

# Of the drawing, in units of its viewBox. A step of the horizontal axis has 7 units.
LEFT, TOP, BOTTOM, WIDTH, HEIGHT = 86, 14, 330, 660, 400
STRIDE = 7
RIGHT = LEFT + STRIDE * STEPS
MIDDLE = (LEFT + RIGHT) // 2


def write_plot(title: str, names: list[str], text: str, sweep: Sweep) -> str:
    """Return a panel: its legend and its drawing. The script replaces the group "moving"."""
    styles = [style_of(name) for name in names]
    keys = [f'<span class="key {style_of(name)}">{name}</span>' for name in names if name != "L"]
    label = html.escape(f"{title} against the {sweep.axis}")
    return "".join([
        f"<figure><figcaption><b>{title}</b> {' '.join(keys)}</figcaption>",
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" ',
        f'data-styles="{" ".join(styles)}">',
        draw_horizontal_axis(sweep),
        f'<g class="moving">{draw_plane(text, styles)}</g></svg></figure>',
    ])


def draw_horizontal_axis(sweep):
    """The labels below a panel, and its line at 0."""
    end = write_number(sweep.radius)
    y = BOTTOM + 28
    return "".join([
        f'<text class="first" x="{LEFT}" y="{y}">−{end}</text>',
        f'<text class="middle" x="{MIDDLE}" y="{y}">0</text>',
        f'<text class="last" x="{RIGHT}" y="{y}">{end}</text>',
        f'<text class="middle" x="{MIDDLE}" y="{y + 32}">{sweep.axis}</text>',
        f'<path class="zero" d="M{MIDDLE} {TOP}V{BOTTOM}"/>',
    ])


def style_of(name):
    styles = {"chosen": "chosen", "good": "chosen", "y₁": "chosen", "y₃": "third", "L": "loss"}
    return styles.get(name, "rejected")


def draw_plane(text: str, styles: list[str]) -> str:
    """Return SVG of the horizontal lines, their labels and the curves. The script of the page does
    the same, and a test compares the two."""
    ticks = text.partition("|")[0].split()
    parts = []
    for index, tick in enumerate(ticks):
        parts.append(draw_tick(tick, index / (len(ticks) - 1)))
    low, high, _ = axis_and_digits(text)
    shares = (decode_curves(text, len(styles)) - low) / (high - low)
    for style, curve in zip(styles, shares.tolist()):
        parts.append(draw_line(style, curve))
    return "".join(parts)


def draw_tick(tick, share):
    y = BOTTOM - round_half_up((BOTTOM - TOP) * share)
    style = "zero" if float(tick) == 0 else "grid"
    label = tick.replace("-", "−")
    return (f'<path class="{style}" d="M{LEFT} {y}H{RIGHT}"/>'
            f'<text class="last" x="{LEFT - 8}" y="{y + 7}">{label}</text>')


def draw_line(style, shares):
    """Draw a curve, whose values are shares of the height."""
    points = []
    for index, share in enumerate(shares):
        x = LEFT + STRIDE * index
        tenths = round_half_up(10 * (BOTTOM - TOP) * share)
        points.append(f"{x},{BOTTOM - tenths / 10:g}")
    return f'<path class="curve {style}" d="M{" ".join(points)}"/>'


def round_half_up(value):
    return int(value + 0.5)


def write_slider(name: str, label: str, stops: list[float], start: int) -> str:
    """Return a slider over the stops of a hyper-parameter."""
    value = f"{stops[start]:g}"
    return (
        f'<label>{label} <input type="range" class="{name}" min="0" max="{len(stops) - 1}" '
        f'step="1" value="{start}" aria-valuetext="{value}"> <output>{value}</output></label>'
    )


def write_sliders(sweep: Sweep) -> str:
    """Return the sliders of a loss."""
    sliders = []
    count = max(1, len(sweep.smoothings))
    beta, smoothing = divmod(sweep.start, count)
    if sweep.betas:
        sliders.append(write_slider("beta", "β", sweep.betas, beta))
    if sweep.smoothings:
        label = "label smoothing ε"
        sliders.append(write_slider("smoothing", label, sweep.smoothings, smoothing))
    reset = '<button type="button" class="reset" disabled>default</button>'
    return f'<div class="sliders">{" ".join(sliders)} {reset}</div>'


def write_plots(function: Callable) -> str:
    """Return the two panels of a loss, its sliders, and the curves for every stop as JSON."""
    sweep = sweep_loss(function)
    planes = []
    for losses_there, pushes in sweep.planes:
        planes.append([encode_curves(losses_there), encode_curves(pushes)])
    loss_text, push_text = planes[sweep.start]
    parts = [
        '<div class="plots">',
        write_plot("Loss", sweep.losses, loss_text, sweep),
        write_plot("Push", sweep.pushes, push_text, sweep),
        "</div>",
    ]
    for tag in tags_of(function):
        if tag in NOTES:
            parts.append(f'<p class="note">{NOTES[tag]}</p>')
    if len(planes) > 1:
        data = {"betas": sweep.betas, "smoothings": sweep.smoothings, "planes": planes}
        parts.append(write_sliders(sweep))
        parts.append(f'<script type="application/json">{json.dumps(data)}</script>')
    return "".join(parts)


# --- The page -------------------------------------------------------------------------------------

def write_loss(function: Callable) -> str:
    """Return the part of the page about one loss."""
    name = function.__name__
    summary, *more = [write_prose(part) for part in introduction(function)]
    anchors = "".join(f'<span id="{other}"></span>' for other in other_names(function))
    also = "".join(f" <small>also <code>{other}</code></small>" for other in other_names(function))
    papers = "<br>".join(write_prose(line) for line in paper_lines(function))
    formula = typeset(docstring_section(function, "Formula"))
    code = highlight(runnable_code(name))
    return "\n".join([
        f'<article id="{name}" data-search="{search_text(function)}">{anchors}',
        f'<h3><a href="#{name}"><code>{name}</code></a>{also}</h3>',
        f'<p class="summary">{summary}</p>',
        *[f"<p>{part}</p>" for part in more],
        f'<p class="tags">{write_tags(function)}</p>',
        f'<div class="formula">{formula}</div>',
        write_plots(function),
        '<div class="text">',
        write_section(function, "Gradient", "Gradient"),
        "<h4>Hyper-parameters</h4>", write_hyperparameters(function),
        write_section(function, "Args", "Arguments"),
        write_section(function, "Elsewhere", "Elsewhere"),
        f"<h4>Paper</h4><p>{papers}</p>",
        "</div>",
        '<div class="code"><button type="button" class="copy">Copy</button>'
        f'<pre tabindex="0" aria-label="code of {name}"><code>{code}</code></pre></div>',
        "</article>",
    ])


def write_index(groups: dict[str, list[Callable]]) -> str:
    """Return the list of links to all losses."""
    parts = []
    for heading, functions in groups.items():
        links = []
        for function in functions:
            name = function.__name__
            links.append(f'<li><a href="#{name}" data-loss="{name}">{name}</a></li>')
        parts.append(f"<section><h2>{heading}</h2><ul>{''.join(links)}</ul></section>")
    return "\n".join(parts)


SYMBOL_COLUMNS = 10  # of a line of SYMBOLS


def write_symbols() -> str:
    """Return tables of the symbols of formulas, one for each kind of loss."""
    parts = []
    for kind, text in SYMBOLS.items():
        rows = []
        for line in text.splitlines():
            symbol, meaning = line[:SYMBOL_COLUMNS].strip(), line[SYMBOL_COLUMNS:]
            rows.append(f"<tr><th scope=row>{typeset(symbol)}</th>"
                        f"<td>{write_prose(meaning)}</td></tr>")
        parts.append(f"<h3>Losses of {kind}</h3><table>{''.join(rows)}</table>")
    return "\n".join(parts)


def make_page() -> str:
    """Return the text of docs/losses.html."""
    groups = group_losses()
    sections = []
    for heading, functions in groups.items():
        cards = "\n".join(write_loss(function) for function in functions)
        sections.append(f'<section class="group"><h2>{heading}</h2>\n{cards}</section>')
    count = sum(len(functions) for functions in groups.values())
    page = TEMPLATE.read_text(encoding="utf-8")
    for mark, text in {
        "{{count}}": str(count),
        "{{geometry}}": json.dumps({"left": LEFT, "top": TOP, "bottom": BOTTOM, "stride": STRIDE,
                                    "steps": STEPS}),
        "{{index}}": write_index(groups),
        "{{symbols}}": write_symbols(),
        "{{losses}}": "\n".join(sections),
    }.items():
        page = page.replace(mark, text)
    return page


def write_book(path: str | pathlib.Path = PAGE) -> None:
    """Write the page to a file."""
    page = make_page()
    with written_aside(pathlib.Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")


def main():
    """Run the command `python book.py`."""
    run_script(write_page)


def write_page(arguments):
    parser = Parser(description="Write the page about all losses")
    parser.add_argument("--out", default=str(PAGE), metavar="FILE.html", help="file to write")
    path = parser.parse_args(arguments).out
    write_book(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
