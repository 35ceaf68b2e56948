"""Reads the formulas that the pages of losses.py print, and evaluates them as they are printed.

    page = Page(sigmoid, values_of(sigmoid, tensors, hyper))
    page.losses()        # [(B,), ...]  every form of L after "Formula"
    page.gradient("w")   # [(B,), ...]  every form of ∂L/∂w after "Gradient", [] if there is none
    page.losses("D")     # of L_D, the loss of a good answer; page.gradient("ℓ", "D") is ∂L_D/∂ℓ

The grammar is that of the pages: a product is written without a sign (βh, 2c (a − η)), a function
takes what follows it (log σ(z), log[...], mean a), "e" has an exponent (e^(−z), eᵃ), and a value
may hold under a condition ("−β while βh < 1, 0 beyond", "while |z| < 2R"). A name that the page
defines, "z = βh" or "s(x) = σ(x) σ(−x)" anywhere after "Formula" or "Gradient", is read there.
Reading stops at the first word or sign that is not part of an expression.

Values of lists are (B, K, 1): one for each answer k. r_j is (B, 1, K), so that an expression of r_k
and r_j is (B, K, K), and r_1 is (B, 1, 1). Σ_k and Σ_{j≥k} are sums of the product that follows.
"""
import inspect
import operator
import re
import unicodedata

import torch

SYMBOL = r"(?:[A-Za-z]{2,}|[A-Za-zℓΑ-Ωα-ω][\u0304°′]*(?:_(?:[A-Za-z]+|1|\{j≥k\}))?)"
TOKEN = re.compile(rf"\s*(∂L/∂[wl]|\d+(?:\.\d+)?|{SYMBOL}|\S|$)")
DEFINITION = re.compile(rf"({SYMBOL})(?:\(({SYMBOL})\))? = ")
EXPONENTS = {"ᵃ": "a", "ᵇ": "b", "ˣ": "x"}
# Letters of the pages, and the names of hyper-parameters that they stand for.
LETTERS = {
    "β": "beta", "β′": "dr_beta", "ε": "label_smoothing", "τ": ".*_tau", "α": ".*_(alpha|a)",
    "λ": ".*_lambda", "γ": "(.*_)?gamma", "δ": "(.*_)?delta", "κ": ".*_kappa", "η": ".*_eta",
    "λ_D": "desirable_weight", "λ_U": "undesirable_weight", "kl": "kl", "β_r": "exo_beta_r",
    "c": "cal_dpo_weight", "R": ".*_r_max", "M": "gap_mean", "μ": "gap_mean", "s": "gap_std",
}


def divergence(p, q):
    """KL( (p, 1 − p) ‖ (q, 1 − q) )"""
    return sum(x * torch.log(x / y) for x, y in zip(p, q))


def tail_sum(x):
    """(B, K, K) -> (B, K, 1): for each k the sum over j >= k"""
    return x.expand(-1, x.shape[2], -1).triu().sum(2, keepdim=True)


# A sum takes the product that follows it.
SUMS = {"Σ": lambda x: x.sum(1, keepdim=True), "Σ_{j≥k}": tail_sum}
FUNCTIONS = SUMS | {
    "σ": torch.sigmoid,
    "log": torch.log,
    "exp": torch.exp,
    "sp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "max": torch.maximum,
    "min": torch.minimum,
    "mean": torch.mean,
    "softmax": lambda x: x.softmax(x.ndim // 2),  # over the batch, or over the answers of a list
    "sort": lambda x: x.sort().values,
    "clip": lambda x, bound: x.clamp(-bound, bound),  # clip(x, ±bound)
    "KL": divergence,
}


def number(value):
    return torch.as_tensor(value, dtype=torch.float64)


def values_of(function, tensors, hyper):
    """{letter: value} of the symbols in the head of losses.py and of the hyper-parameters."""
    t = {name: number(value) for name, value in tensors.items()}
    values = letters_of(hyper)
    if "policy_logps" in t:
        return values | values_of_answers(t, values["β"])
    for side, answer in (("w", "chosen"), ("l", "rejected")):
        values[side] = t[f"policy_{answer}_logps"]
        values[f"{side}°"] = t[f"ref_{answer}_logps"]
        values[f"n_{side}"] = t[f"{answer}_lengths"]
        values[f"s_{side}"] = t[f"{answer}_scores"]
    values["a"], values["b"] = values["w"] - values["w°"], values["l"] - values["l°"]
    values["h"] = values["a"] - values["b"]
    for side, ratio in (("w", "a"), ("l", "b")):
        values[f"{side}\u0304"] = values[side] / values[f"n_{side}"]
        values[f"{ratio}\u0304"] = values[ratio] / values[f"n_{side}"]
    values["h\u0304"] = values["a\u0304"] - values["b\u0304"]
    values["n\u0304"] = values["n_w"].mean()
    values["t"] = t.get("policy_target_logps", values["w"])  # log π(y_ref|x)
    if "β" in values:
        beta = values["β"]
        values["r_w"], values["r_l"] = beta * values["a"], beta * values["b"]
        # Our beta is the τ of IPO, the λ of ORPO, and 1/η of SPPO.
        values = {"τ": beta, "λ": beta, "η": 1 / beta} | values
    return values


def letters_of(hyper):
    """{letter: value} of the hyper-parameters."""
    values = {}
    for letter, names in LETTERS.items():
        for name, value in hyper.items():
            if re.fullmatch(names, name) and value is not None:
                values[letter] = number(value)
    return values


def values_of_answers(t, beta):
    """{letter: value} of single answers (N,), or of lists (B, K, 1)."""
    values = {"r": beta * (t["policy_logps"] - t["ref_logps"])}
    if "scores" in t:
        values["s"] = t["scores"]
    if "mask" not in t:
        return values
    size = number(t["mask"].shape[1])
    return {letter: value[..., None] for letter, value in values.items()} | {"K": size}


class Page:
    """The docstring of a loss, and the values of its symbols."""

    def __init__(self, function, values):
        text = unicodedata.normalize("NFD", inspect.getdoc(function))
        text = text.replace("log π(y_ref|x)", "t").replace("mean of ", "mean ")
        self.name = function.__name__
        self.values = FUNCTIONS | values
        formula = text.split("\nFormula ")[1].split("\nGradient ")[0].strip()
        # A line ends an expression, and so does a gap of spaces.
        self.formula = re.sub(r"(?<![+−/])\s*\n\s*| {4,}", " ; ", formula)
        self.slopes = " ".join(text.split("\nGradient ")[1].split("\nArgs ")[0].split())

    def losses(self, label=None):
        """Every form of L: the text after "L =", and lines that begin with "=". With a label, "D"
        or "U", every form of L_D or L_U."""
        forms, name = [], None
        for piece in self.formula.split(" ; "):
            start = re.match(r"(?:(L(?:_[A-Za-z])?)\s*)?= ", piece)
            if start is None:
                continue
            name = start.group(1) or name
            if label is None or name == f"L_{label}":
                forms.append(Reader(self, piece[start.end():]).total())
        return forms

    def gradient(self, side, label="i"):
        """Every form of ∂L/∂w or ∂L/∂l; of ∂L_D/∂ℓ with the side "ℓ" and the label "D"."""
        printed = re.search(rf"∂L(_{label})?/∂{side}(_i)? = ", self.slopes)
        if printed:
            return Reader(self, self.slopes[printed.end():]).statement()
        if side == "l" and "= −∂L/∂l" in self.slopes:
            return [-form for form in self.gradient("w")]
        return []

    def lookup(self, symbol):
        """The value or the function of that name, or None."""
        if symbol.endswith("_j"):  # of the answer j of a list
            return self.lookup(symbol[:-2]).transpose(1, 2)
        if symbol.endswith("_1"):  # of its first answer
            return self.lookup(symbol[:-2])[:, :1]
        symbol = re.sub("_[ik]$", "", symbol)  # of the pair k of the batch, or of the answer k
        value = self.defined(symbol, self.formula)
        if value is None and symbol in self.values:
            value = self.values[symbol]
        return self.defined(symbol, self.slopes) if value is None else value

    def defined(self, symbol, text):
        """What the text defines under this name: a value, or a function if the name has an
        argument. None if there is no definition."""
        for definition in DEFINITION.finditer(text):
            name, argument = definition.groups()
            expression = text[definition.end():]
            if name != symbol or expression.startswith("−∂L"):
                continue
            if argument is None:
                return Reader(self, expression).total()
            return lambda value: Reader(self, expression, {argument: value}).total()
        return None


class Reader:
    """Evaluates the expression at the beginning of a text."""

    def __init__(self, page, text, arguments=None):
        self.page, self.text, self.at = page, text, 0
        self.arguments = arguments or {}

    def peek(self):
        return TOKEN.match(self.text, self.at).group(1)

    def take(self):
        token = TOKEN.match(self.text, self.at)
        self.at = token.end()
        return token.group(1)

    def expect(self, *wanted):
        token = self.take()
        before = self.text[max(self.at - 30, 0):self.at]
        assert token in wanted, f"page of {self.page.name}: {wanted} expected where {before!r} ends"

    def lookup(self, symbol):
        if symbol in self.arguments:
            return self.arguments[symbol]
        return self.page.lookup(symbol)

    def statement(self):
        """FORM [= FORM ...] [while LEFT < RIGHT, [and] [exactly] FORM otherwise]"""
        forms = [self.total()]
        while self.peek() == "=":
            self.take()
            if self.text[self.at:].lstrip().startswith("−∂L/∂l"):
                self.expect("−")
                self.expect("∂L/∂l")
            else:
                forms.append(self.total())
        if self.peek() != "while":
            return forms
        self.take()
        left, compare, right = self.total(), self.take(), self.total()
        holds = {"<": operator.lt, ">": operator.gt}[compare](left, right)
        self.expect(",")
        while self.peek() in ("and", "exactly"):
            self.take()
        other = self.total()
        self.expect("beyond", "otherwise")
        return [torch.where(holds, form, other) for form in forms]

    def total(self):
        value = self.product()
        while self.peek() in ("+", "−"):
            sign = 1 if self.take() == "+" else -1
            value = value + sign * self.product()
        return value

    def product(self):
        if self.peek() in ("−", "±"):
            sign = -1 if self.take() == "−" else 1
            return sign * self.product()
        value = self.power()
        while True:
            if self.peek() == "/":
                self.take()
                value = value / self.power()
            elif self.begins_factor(self.peek()):
                value = value * self.power()
            else:
                return value

    def begins_factor(self, token):
        known = token in ("(", "[", "½", "e") or token.isdecimal()
        return known or self.lookup(token) is not None

    def power(self):
        value = self.atom()
        if self.peek() == "²":
            self.take()
            value = value ** 2
        return value

    def atom(self):
        """A number, values in brackets, an exponential, a symbol, or a function of what follows."""
        token = self.take()
        if token in ("(", "["):
            values = self.until_bracket()
            return values if len(values) > 1 else values[0]
        if token == "|":
            value = self.total()
            self.expect("|")
            return value.abs()
        if token == "½" or token[0].isdecimal():
            return number(0.5 if token == "½" else float(token))
        if token == "e":
            return self.exponential()
        value = self.lookup(token)
        assert value is not None, f"page of {self.page.name}: {token!r} in {self.text!r} is unknown"
        if not callable(value):
            return value
        if value in SUMS.values():
            return value(self.product())
        if self.peek() in ("(", "["):
            self.take()
            return value(*self.until_bracket())
        return value(self.power())

    def exponential(self):
        if self.peek() in EXPONENTS:
            return torch.exp(self.lookup(EXPONENTS[self.take()]))
        self.expect("^")
        return torch.exp(self.atom())

    def until_bracket(self):
        """The values before the closing bracket."""
        values = [self.total()]
        while self.peek() in (",", "‖"):
            self.take()
            values.append(self.total())
        self.expect(")", "]")
        return values
