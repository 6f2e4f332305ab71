"""Formulas of the notebooks as MathML, which browsers draw by themselves: a book that opens offline needs no MathJax.

It knows the part of TeX that explanations of this size use: text, fractions, roots, indices, braces below, Greek,
operators. Invariant: what it does not know is shown as it was written, whole, never half translated.
"""

from __future__ import annotations

import re
from html import escape

SYMBOLS = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "theta": "θ", "lambda": "λ", "mu": "μ",
    "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "omega": "ω", "Delta": "Δ", "Sigma": "Σ",
    "le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "approx": "≈", "cdot": "·", "times": "×", "div": "÷",
    "pm": "±", "in": "∈", "infty": "∞", "to": "→", "rightarrow": "→", "dots": "…", "ldots": "…", "cdots": "⋯",
    "sum": "∑", "prod": "∏", "lceil": "⌈", "rceil": "⌉", "lfloor": "⌊", "rfloor": "⌋", "mid": "|", "top": "⊤",
    "{": "{", "}": "}", "%": "%", "_": "_", "left": "", "right": ""}
NAMES = {"max", "min", "exp", "log", "ln", "sin", "cos", "arg"}
SPACES = {"quad": "1em", "qquad": "2em", ",": "0.17em", ";": "0.28em", " ": "0.25em", "!": "0em"}
LETTERS = set("αβγδεθλμπρστφωΔΣ∞")
TOKEN = re.compile(r"\\([A-Za-z]+|.)|([0-9]+(?:\.[0-9]+)?)|(\s+)|(.)", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(\S(?:[^$\n]*?\S)?)\$(?![0-9])", re.DOTALL)


class UnknownTeX(ValueError):
    """A command that is not translated."""


def with_mathml(text: str) -> str:
    """Markdown with its $formulas$ and $$displayed formulas$$ translated; code is left alone."""
    pieces = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    return "".join(piece if piece.startswith("`") else FORMULA.sub(_replace, piece) for piece in pieces)


def _replace(match: re.Match[str]) -> str:
    shown, inline = match[1], match[2]
    try:
        return mathml(shown or inline, block=shown is not None)
    except UnknownTeX:
        return f"<code>{escape(shown or inline)}</code>"


def mathml(tex: str, *, block: bool = False) -> str:
    """One formula.

    Raises:
        UnknownTeX: it names a command that is not known, or its braces do not match.
    """
    tokens = [" " if match[3] else match.group(0) for match in TOKEN.finditer(tex.strip())]
    body, rest = _row(tokens, 0)
    if rest != len(tokens):
        raise UnknownTeX(f"unmatched brace in {tex!r}")
    return f'<math display="{"block" if block else "inline"}"><mrow>{body}</mrow></math>'


def _row(tokens: list[str], at: int) -> tuple[str, int]:
    """Atoms with their indices up to a closing brace or the end; where that is."""
    parts: list[str] = []
    while (at := _after_spaces(tokens, at)) < len(tokens) and tokens[at] != "}":
        braced = tokens[at] == r"\underbrace"
        atom, at = _atom(tokens, at)
        below, above = "", ""
        while at < len(tokens) and tokens[at] in ("_", "^"):
            sign = tokens[at]
            index, at = _atom(tokens, at + 1)
            below, above = (index, above) if sign == "_" else (below, index)
        kind = "under" if braced or atom == "<mo>∑</mo>" else "sub"
        if below and above:
            kind = {"under": "munderover", "sub": "msubsup"}[kind]
            atom = f"<{kind}>{atom}{below}{above}</{kind}>"
        elif below:
            atom = f"<m{kind}>{atom}{below}</m{kind}>"
        elif above:
            atom = f"<msup>{atom}{above}</msup>"
        parts.append(atom)
    return "".join(parts), at


def _after_spaces(tokens: list[str], at: int) -> int:
    while at < len(tokens) and tokens[at] == " ":
        at += 1
    return at


def _atom(tokens: list[str], at: int) -> tuple[str, int]:
    """One group, command, number, letter or sign."""
    at = _after_spaces(tokens, at)
    if at >= len(tokens):
        raise UnknownTeX("a formula ends where something must follow")
    token = tokens[at]
    if token == "{":
        body, end = _row(tokens, at + 1)
        if end >= len(tokens):
            raise UnknownTeX("unmatched brace")
        return f"<mrow>{body}</mrow>", end + 1
    if token.startswith("\\"):
        return _command(token[1:], tokens, at + 1)
    if token[0].isdigit():
        return f"<mn>{token}</mn>", at + 1
    return (f"<mi>{token}</mi>" if token.isalpha() else f"<mo>{escape(token.replace('-', '−'))}</mo>"), at + 1


def _command(name: str, tokens: list[str], at: int) -> tuple[str, int]:
    if name in ("text", "mathrm", "operatorname"):
        if at >= len(tokens) or tokens[at] != "{" or "}" not in tokens[at:]:
            raise UnknownTeX(f"\\{name} needs braces")
        end = tokens.index("}", at)
        return f"<mtext>{escape(''.join(tokens[at + 1:end]))}</mtext>", end + 1
    if name in ("frac", "sqrt", "underbrace", "hat", "bar"):
        first, at = _atom(tokens, at)
        if name == "frac":
            second, at = _atom(tokens, at)
            return f"<mfrac>{first}{second}</mfrac>", at
        if name == "sqrt":
            return f"<msqrt>{first}</msqrt>", at
        if name == "underbrace":
            return f'<munder>{first}<mo stretchy="true">⏟</mo></munder>', at
        return f"<mover>{first}<mo>{'^' if name == 'hat' else '¯'}</mo></mover>", at
    if name in SPACES:
        return f'<mspace width="{SPACES[name]}"/>', at
    if name in NAMES:
        return f"<mi>{name}</mi>", at
    if name not in SYMBOLS:
        raise UnknownTeX(f"\\{name} is not translated")
    sign = SYMBOLS[name]
    return (f"<mi>{sign}</mi>" if sign in LETTERS else f"<mo>{sign}</mo>" if sign else ""), at
