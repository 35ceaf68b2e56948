"""Computes the value of a typeset formula from its MathML, so that a test can compare it with the
function that it describes.

    found = equations(typeset("L = (z − g)²,    z = βh"))     # [("L", "(z-g)**(2)"), ("z", "β*h")]
    loss_values(found, {"β": 0.1, "h": 3.0, "g": 1.0})        # [("L", 0.49)]

An equation without a left side, "= ...", is another form of the loss before it.
"""
import re
import xml.etree.ElementTree as ElementTree

import torch
import torch.nn.functional as F

APPLY = "\u2061"
NAMES = {"log", "exp", "sp", "max", "min", "clip", "sort", "softmax", "mean", "lo", "KL", "σ", "φ"}


# The left sides that are the loss itself.
LOSS_NAMES = {"L", "L_i", "at(L, k)", "L_D", "L_U"}


def divergence(left, right):
    return sum(p * torch.log(p / q) for p, q in zip(left, right))


FUNCTIONS = {
    "log": torch.log, "σ": torch.sigmoid, "sp": F.softplus, "exp": torch.exp,
    "max": lambda x, y: torch.maximum(*as_tensors(x, y)),
    "min": lambda x, y: torch.minimum(*as_tensors(x, y)),
    "clip": lambda x, y: torch.clamp(x, -y, y),
    "sort": lambda x: x.sort().values,
    "softmax": lambda x: x.softmax(-1),
    "mean": torch.mean,
    "KL": divergence,
    "at": lambda x, k: x[..., k - 1],
    "total": lambda term, first, last: sum(term(k) for k in range(first, last + 1)),
}


def as_tensors(*values):
    return torch.broadcast_tensors(*[torch.as_tensor(value, dtype=torch.float64)
                                     for value in values])


def equations(html):
    """Return (left side, Python source of the right side) of each equation of a formula."""
    found, last = [], ""
    for segment in ElementTree.fromstring(f"<div>{html}</div>").iter("span"):
        if segment.get("class") != "segment":
            continue
        for left, right in read_segment(segment):
            left = left or last
            if left in LOSS_NAMES:
                last = left
            found.append((left, right))
    return found


def read_segment(segment):
    tokens = []
    for piece in segment:
        if piece.tag == "math":
            tokens += row_tokens(piece[0])
        else:
            same = piece.text.strip().startswith("which is")
            tokens.append(("operator", "=" if same else "words"))
    found, left = [], ""
    for part in split(tokens, {",", "words", ":"}):
        sides = split(part, {"="})
        if len(sides) == 1 or not sides[-1]:
            continue
        if sides[0]:
            left = expression(sides[0])
        found += [(left, expression(side)) for side in sides[1:] if side]
    return found


def split(tokens, operators):
    parts = [[]]
    for token in tokens:
        if token[0] == "operator" and token[1] in operators:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def row_tokens(row):
    tokens = []
    for child in row:
        text = (child.text or "").strip()
        if child.tag == "mspace":
            continue
        if text == APPLY:
            if tokens[-1][1] in ("s", "π"):  # a function with the name of a variable
                tokens[-1] = ("function", tokens[-1][1])
            continue
        if child.tag == "mo":
            tokens.append(("operator", text))
        elif child.tag == "mrow" and len(child) and child[0].text in ("(", "["):
            tokens.append(("group", expression(row_tokens(child[1]))))
        elif child.tag == "mrow":
            tokens += row_tokens(child)
        elif child.tag == "mi" and text in NAMES:
            tokens.append(("function", text))
        elif child.tag == "munder":
            tokens.append(("sum", "".join(child[1].itertext())))
        else:
            tokens.append(("factor", source(child)))
    return tokens


def source(element):
    """Python source of a symbol, a fraction or a power."""
    if element.tag == "mfrac":
        return f"(({expression(row_tokens(element[0]))})/({expression(row_tokens(element[1]))}))" \
            if len(element[0]) else f"({element[0].text}/{element[1].text})"
    if element.tag == "mover":
        return f"{element[0].text}_bar"
    if element.tag == "msub":
        base, index = source(element[0]), "".join(element[1].itertext())
        is_index = index in ("k", "j", "1")
        return f"at({base}, {index})" if is_index else f"{base}_{index}"
    if element.tag == "msup":
        above = "".join(element[1].itertext())
        if above in ("∘", "′"):
            return f"{source(element[0])}_{'ref' if above == '∘' else 'prime'}"
        power = expression(row_tokens(element[1]))
        if element[0].text == "e":
            return f"exp({power})"
        base = element[0]
        inside = expression(row_tokens(base[1])) if base.tag == "mrow" else source(base)
        return f"(({inside})**({power}))"
    return element.text


def expression(tokens):
    """Python source of a row: sums of products, separated by commas."""
    parts = []
    for part in split(tokens, {",", "‖", "|"}):
        terms, sign, product = "", "", []
        for token in [*part, ("operator", "+")]:
            if token[0] == "operator" and token[1] in "+−±":
                if product:
                    terms += f"{sign or '+'}{term(product)}"
                sign, product = {"−": "-"}.get(token[1], "+"), []
            else:
                product.append(token)
        parts.append(terms.removeprefix("+"))
    return "(" + "), (".join(parts) + ")" if len(parts) > 1 else parts[0]


def term(tokens):
    """Python source of a product. A function without brackets takes what follows it."""
    factors, position = [], 0
    while position < len(tokens):
        kind, text = tokens[position]
        rest = tokens[position + 1:]
        if kind == "operator" and text == "/":
            factors[-1] = f"{factors[-1]}/{tokens[position + 1][1]}"
            position += 1
        elif kind == "function" and rest and rest[0][0] == "group":
            factors.append(f"{text}({rest[0][1]})")
            position += 1
        elif kind == "function" and rest:
            return "*".join([*factors, f"{text}({term(rest)})"])
        elif kind == "sum":
            index, _, first = text.partition("≥")
            total = f"total(lambda {index}: {term(rest)}, {first or 1}, K)"
            return "*".join([*factors, total])
        else:
            factors.append(f"({text})" if kind == "group" else text)
        position += 1
    return "*".join(factors)


class Values(dict):
    """Values of symbols. A symbol that an equation defines is computed when it is asked for."""

    def __init__(self, given, definitions):
        defined = {left for left, _ in definitions}
        super().__init__(FUNCTIONS)
        self.update({name: each for name, each in given.items() if name not in defined})
        self.definitions = definitions
        for left, right in definitions:
            call = re.fullmatch(r"(\w+)\((\w)\)", left)
            if call:
                self[call[1]] = eval(f"lambda {call[2]}: {right}", self)

    def __missing__(self, name):
        for left, right in self.definitions:
            if left == name:
                self[name] = eval(right, self)
                return self[name]
        raise KeyError(name)


def loss_values(found, given):
    """Return [(left side, value)] of every form of the loss among the equations."""
    values = Values(given, found)
    return [(left, eval(right, values)) for left, right in found if left in LOSS_NAMES]
