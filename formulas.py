"""Typesets the formulas of the docstrings in losses.py: Unicode text in, MathML out.

    typeset("L = (h̄ − 1/(2τ))²")     -> <math>...</math> with a fraction, an accent and a square

The docstrings write formulas as a person types them: `_` and `^` begin scripts, `Σ_{j≥k}` is a sum,
`a/b` a fraction, "log σ(βh)" an application of functions. `parse_formula` reads one line into a
tree, `to_mathml` writes a tree. A tree is a list of nodes, and a node is a tuple (kind, ...):

    ("symbol", text)                      a variable or a number; a bar is a combining character
    ("function", text)                    log, σ, max
    ("operator", text)                    + − = , and the like
    ("words", text)                       English words in a formula
    ("space",)                            a space between two factors
    ("group", open, tree, close)          brackets
    ("call", node, group)                 a function right before a bracket
    ("scripts", node, below, above)       trees of the subscript and the superscript, or None
    ("fraction", above, below)            two trees

A formula with a character that is not known here raises FormulaError, and `typeset` then returns
the text as it is.
"""
import html
import re

# Names that are set upright. Other words of two letters and more are English.
FUNCTIONS = {"log", "exp", "sp", "max", "min", "clip", "sort", "softmax", "mean", "lo", "KL",
             "σ", "φ"}
NAMES = {"kl", "ref"}
CALLABLE = FUNCTIONS | {"s", "π", "f"}  # a bracket right behind one of these is its argument

OPEN, CLOSE = "([{", {"(": ")", "[": "]", "{": "}"}
SUPERSCRIPTS = {"²": "2", "³": "3", "ᵃ": "a", "ᵇ": "b", "ˣ": "x", "°": "°", "′": "′"}
TOKEN = re.compile(r"""
    (?P<space>  \s+ )
  | (?P<word>   [A-Za-z]+(?:-[A-Za-z]+)+ | [A-Za-z]{2,}(?!\u0304) )
  | (?P<number> \d+(?:\.\d+)? | [½∞] )
  | (?P<sum>    Σ )
  | (?P<letter> [A-Za-zα-ωΑ-Ωℓ]\u0304? )
  | (?P<above>  [²³ᵃᵇˣ°′] )
  | (?P<mark>   [_^/()\[\]{}] )
  | (?P<operator> [=+−±·,.:;|‖≥≤<>→] )
""", re.VERBOSE)
LOOSE = set("=+−±,:;")  # a slash with spaces around it divides everything between two of these


class FormulaError(Exception):
    """A formula that these rules cannot read."""


def read_tokens(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each token. English words get the kind "words"."""
    tokens, position = [], 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            raise FormulaError(f"no rule for {text[position]!r} in the formula {text}")
        tokens.append((match.lastgroup, match.group()))
        position = match.end()
    return name_words(tokens)


def name_words(tokens):
    """Tell functions and names from English. In "the mean is" and "a moving average", "mean" and
    "a" are English too."""
    named = []
    for index, (kind, text) in enumerate(tokens):
        following = next_word(tokens, index)
        is_english = following not in FUNCTIONS | NAMES | {""}
        if kind == "word" and text in FUNCTIONS and not is_english:
            kind = "function"
        elif kind == "word" and text in NAMES:
            kind = "letter"
        elif kind == "word" or (text == "a" and is_english):
            kind = "words"
        elif text in FUNCTIONS:
            kind = "function"
        if text in ",.:;" and named and named[-1][0] == "words":  # punctuation of the English
            named[-1] = ("words", named[-1][1] + text)
            continue
        named.append((kind, text))
    return named


def next_word(tokens, index):
    """Return the word after the token and a space, or ""."""
    if index + 2 < len(tokens) and tokens[index + 1][0] == "space":
        kind, text = tokens[index + 2]
        return text if kind == "word" else ""
    return ""


class FormulaReader:
    """Reads tokens from left to right. Each method returns what it read and stands behind it."""

    def __init__(self, tokens):
        self.tokens, self.position = tokens, 0

    def peek(self, ahead=0):
        index = self.position + ahead
        return self.tokens[index] if index < len(self.tokens) else ("end", "")

    def take(self):
        token = self.peek()
        self.position += 1
        return token

    def tree(self, close=""):
        """Read up to a closing bracket, or to the end."""
        nodes = []
        while self.peek()[1] != close:
            kind, text = self.peek()
            if kind == "end" or text in ")]}":
                raise FormulaError(f"brackets do not match: {text or close!r}")
            if kind == "space":
                self.take()
                nodes.append(("space",))
            elif kind == "operator":
                self.take()
                nodes.append(("operator", text))
            elif text == "/":
                self.divide(nodes)
            else:
                nodes.append(self.factor())
        self.take()
        return tidy(nodes)

    def divide(self, nodes):
        """Replace the last nodes by a fraction: b/c in `a b/c d`, everything in `a b / c d`."""
        self.take()
        if self.peek()[0] != "space":
            if not nodes or nodes[-1][0] in ("operator", "space"):
                raise FormulaError("a fraction has nothing above its line")
            above = [nodes.pop()]
            nodes.append(("fraction", above, [self.factor()]))
            return
        above = []
        while nodes and not (nodes[-1][0] == "operator" and nodes[-1][1] in LOOSE):
            above.insert(0, nodes.pop())
        self.take()
        below = [self.factor()]
        while self.peek()[0] == "space" and self.peek(1)[0] in ("letter", "number", "function"):
            self.take()
            below += [("space",), self.factor()]
        nodes.append(("fraction", tidy(above), below))

    def factor(self):
        """Read a symbol, a function or a bracket, with scripts and arguments."""
        kind, text = self.take()
        if text and text in OPEN:
            node = ("group", text, self.tree(CLOSE[text]), CLOSE[text])
        elif kind == "words":
            node = ("words", text)
        elif kind == "function":
            node = ("function", text)
        elif kind in ("letter", "number", "sum"):
            node = ("symbol", text)
        else:
            raise FormulaError(f"a formula has {text!r} where a symbol is expected")
        node = self.scripts(node)
        head = node[1] if node[0] != "scripts" else node[1][1]
        if head in CALLABLE and self.peek()[1] in ("(", "["):
            node = ("call", node, self.factor())
        return node

    def scripts(self, node):
        """Read the scripts behind a node: `_k`, `^(...)`, a superscript character, a prime."""
        below, above = [], []
        while self.peek()[1] in ("_", "^") or self.peek()[0] == "above":
            kind, text = self.take()
            if kind == "above":
                above.append(("symbol", SUPERSCRIPTS[text]))
            elif text == "_":
                below += self.script()
            else:
                above += self.script()
        if not below and not above:
            return node
        return ("scripts", node, below, above)

    def script(self):
        """Read one script. Brackets around it only say where it ends."""
        kind, text = self.take()
        if text and text in "({":
            return self.tree(CLOSE[text])
        if kind in ("letter", "number"):
            return [("symbol", text)]
        raise FormulaError(f"a script begins with {text!r}")


def tidy(nodes):
    """Join words, and drop spaces at the ends and around operators."""
    kept = []
    for index, node in enumerate(nodes):
        neighbors = nodes[max(0, index - 1):index + 2]
        near_operator = any(each[0] == "operator" for each in neighbors)
        if node[0] == "space" and (near_operator or index in (0, len(nodes) - 1)):
            continue
        if node[0] == "words" and len(kept) > 1 and kept[-2][0] == "words":
            kept[-2:] = [("words", f"{kept[-2][1]} {node[1]}")]
            continue
        kept.append(node)
    return kept


def parse_formula(text: str) -> list[tuple]:
    """Return the tree of one line of a formula, or raise FormulaError."""
    return FormulaReader(read_tokens(text)).tree()


# --- MathML ---------------------------------------------------------------------------------------

def to_mathml(tree: list[tuple], in_script: bool = False, continues: bool = False) -> str:
    """Return the MathML of a tree. Fractions in scripts get a slash. If the tree continues another
    one, an operator at its start has a left operand."""
    parts, before = [], ("symbol", "") if continues else ("operator", "")
    for node in tree:
        if node[0] == "operator":
            parts.append(write_operator(node[1], before[0] == "operator"))
        else:
            if before[0] in ("function", "scripts") and node[0] not in ("space", "group"):
                parts.append(APPLY)
            parts.append(write_node(node, in_script))
        before = node
    return "".join(parts)


APPLY = "<mo>&#8289;</mo>"
THIN_SPACE = '<mspace width="0.17em"/>'
# Operators whose spacing by default is wrong for these formulas.
SPACING = {
    "|": ' stretchy="false" lspace="0.1em" rspace="0.1em"',
    "‖": ' stretchy="false" lspace="0.3em" rspace="0.3em"',
    ",": ' lspace="0" rspace="0.3em"',
    ".": ' lspace="0" rspace="0.3em"',
    ":": ' lspace="0" rspace="0.3em"',
}


def write_operator(text, is_prefix):
    if text in "−±+" and is_prefix:
        return f'<mo form="prefix" lspace="0" rspace="0">{text}</mo>'
    form = ' form="infix"' if text in "−±+=" else ""
    return f"<mo{form}{SPACING.get(text, '')}>{html.escape(text)}</mo>"


def write_node(node, in_script):
    kind = node[0]
    if kind == "space":
        return THIN_SPACE
    if kind == "words":
        return f"<mtext>&#160;{node[1]}&#160;</mtext>"
    if kind == "function":
        return f"<mi>{node[1]}</mi>"
    if kind == "symbol":
        return write_symbol(node[1])
    if kind == "group":
        return write_group(node, in_script)
    if kind == "call":
        argument = write_group(node[2], in_script)
        return f"<mrow>{write_node(node[1], in_script)}{APPLY}{argument}</mrow>"
    if kind == "scripts":
        return write_scripts(*node[1:], in_script)
    return write_fraction(*node[1:], in_script)


def write_symbol(text):
    if text.endswith("\u0304"):
        return f'<mover accent="true"><mi>{text[0]}</mi><mo stretchy="false">¯</mo></mover>'
    if text == "½":
        return "<mfrac><mn>1</mn><mn>2</mn></mfrac>"
    if text[0].isdigit():
        return f"<mn>{text}</mn>"
    if text in "Σ°′":
        return f"<mo>{dict(zip('Σ°′', '∑∘′'))[text]}</mo>"
    return f"<mi>{text}</mi>"


def write_group(node, in_script):
    _, opening, tree, closing = node
    inside = to_mathml(tree, in_script)
    is_tall = "<mfrac" in inside or "<munder>" in inside
    style = f'stretchy="{str(is_tall).lower()}" lspace="0" rspace="0"'
    return f"<mrow><mo {style}>{opening}</mo><mrow>{inside}</mrow><mo {style}>{closing}</mo></mrow>"


def write_scripts(base, below, above, in_script):
    bases = write_node(base, in_script)
    low = f"<mrow>{to_mathml(below, True)}</mrow>"
    high = f"<mrow>{to_mathml(above, True)}</mrow>"
    if base == ("symbol", "Σ"):
        return f"<munder>{bases}{low}</munder>"
    if not above:
        return f"<msub>{bases}{low}</msub>"
    if not below:
        return f"<msup>{bases}{high}</msup>"
    return f"<msubsup>{bases}{low}{high}</msubsup>"


def write_fraction(above, below, in_script):
    if in_script:
        return f"<mrow>{to_mathml(above, True)}<mo>/</mo>{to_mathml(below, True)}</mrow>"
    high, low = to_mathml(without_brackets(above)), to_mathml(without_brackets(below))
    if low.startswith("<mover"):  # keep the bar of a symbol off the line of the fraction
        low = f'<mspace width="0" height="0.85em"/>{low}'
    return f"<mfrac><mrow>{high}</mrow><mrow>{low}</mrow></mfrac>"


def without_brackets(tree):
    """The line of a fraction says where its parts end."""
    if len(tree) == 1 and tree[0][0] == "group" and tree[0][1] in "([":
        return tree[0][2]
    return tree


# --- Pages ----------------------------------------------------------------------------------------

LONG = 34  # characters of a formula that may be broken before an operator


def split_lines(text: str) -> list[str]:
    """Return the lines of a formula. A line that only continues an English sentence is joined."""
    lines = []
    for line in text.splitlines():
        continues = re.match(r"[a-z]+ [a-z]", line.strip())
        if lines and continues:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
    return lines


def break_tree(tree: list[tuple], is_long: bool) -> list[list[tuple]]:
    """Split a tree where a line of the page may end: at words, after a comma, and in a long formula
    before an operator."""
    pieces = [[]]
    for index, node in enumerate(tree):
        before = tree[index - 1] if index else ("operator", "")
        is_binary = node[0] == "operator" and node[1] in "=+−" and before[0] != "operator"
        at_words = "words" in (node[0], before[0])
        after_comma = before == ("operator", ",")
        if (is_long and is_binary) or at_words or after_comma:
            pieces.append([])
        pieces[-1].append(node)
    return [piece for piece in pieces if tidy(piece)]


def typeset(text: str) -> str:
    """Return the HTML of a formula: a line for each of its lines, in which each piece is MathML or
    English. A formula that cannot be read is returned as preformatted text."""
    try:
        lines = [typeset_line(line) for line in split_lines(text)]
    except FormulaError:
        return f'<pre class="plain">{html.escape(text)}</pre>'
    return "\n".join(lines)


def typeset_line(line):
    segments = []
    for segment in re.split(r"\s{3,}", line):
        pieces = []
        for piece in break_tree(parse_formula(segment), len(segment) > LONG):
            pieces.append(write_piece(piece, bool(pieces)))
        segments.append(f'<span class="segment">{" ".join(pieces)}</span>')
    return f'<div class="line">{" ".join(segments)}</div>'


def write_piece(piece, continues):
    piece = [node for node in piece if node[0] != "space" or len(piece) > 1]
    if piece[0][0] == "words":
        words = "".join(html.escape(node[1]) for node in piece if node[0] != "space")
        return f'<span class="words">{words}</span>'
    content = to_mathml(tidy(piece), continues=continues)
    return f'<math displaystyle="true"><mrow>{content}</mrow></math>'
