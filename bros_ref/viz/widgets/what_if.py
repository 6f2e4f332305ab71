"""What if: choose a setting, and see its effect on both classes. The answers come from a function of the caller.

A question is one value for each choice; an answer is one element of "runs" of the result JSON. Pictures and words are
pure functions of answers, made here; `static/what_if.js` holds the controls and shows the picture of the chosen
setting. What was asked beforehand is in the page, which thus works without a kernel; with one, every other setting is
asked when it is chosen. Invariant: a picture shows real answers only and never interpolates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from bros_ref.viz.figures.style import FONT, GRID, INK, MUTED, PAPER, policy_look, round_values
from bros_ref.viz.widgets.html import OWN_KEYS, notebook_output, widget_html
from bros_ref.viz.widgets.kernel_watch import kernel_script

Question = dict[str, Any]
Answer = Mapping[str, Any]
WIDTH, HEIGHT, LEFT, TOP, PLANE_W, PLANE_H = 760, 330, 58, 20, 400, 252  # SVG units
MARKERS = {  # outlines around (0, 0), by the names that `style.POLICY_MARKERS` uses
    "circle": "M-6 0a6 6 0 1 0 12 0a6 6 0 1 0 -12 0Z", "diamond": "M0 -8L8 0L0 8L-8 0Z",
    "square": "M-6 -6H6V6H-6Z", "triangle-up": "M0 -8L8 6H-8Z", "x": "M-6 -3L-3 -6L0 -3L3 -6L6 -3L3 0L6 3L3 6L0 3L-3 6L"
    "-6 3L-3 0Z", "star": "M0 -9L2 -3H8L3 1L5 7L0 3L-5 7L-3 1L-8 -3H-2Z", "triangle-down": "M0 8L8 -6H-8Z",
    "pentagon": "M0 -8L8 -2L5 7H-5L-8 -2Z", "cross": "M-2 -7H2V-2H7V2H2V7H-2V2H-7V-2H-2Z"}


@dataclass(frozen=True)
class Choice:
    """One control: numbers get a slider over `values`, words a list. `unit` stands behind a value; None is shown as
    "none".

    Raises:
        ValueError: no values.
    """

    name: str
    label: str
    values: tuple[Any, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"the choice {self.name!r} has no values to choose from; give at least one")

    def shown(self, index: int) -> str:
        """A value as it is written on the page."""
        value = self.values[index]
        if value is None:
            return "none"
        text = value if isinstance(value, str) else f"{value:,g}" if value < 1e6 else f"{value:,}"
        return f"{text} {self.unit}".rstrip()


def facts(answer: Answer) -> dict[str, str]:
    """The values shown of an answer, by name."""
    rt, be, kv = answer["classes"]["rt"], answer["classes"]["be"], answer["kv"]

    def spread(metric: str) -> str:
        median, p99 = rt[f"median_{metric}_ms"], rt[f"p99_{metric}_ms"]
        return "no sample" if median is None else f"{median:,.0f} ms, {p99:,.0f} ms"

    return {"RT on time": "no RT arrived" if rt["slo_attainment"] is None else f"{rt['slo_attainment']:.0%}",
            "RT TTFT median, p99": spread("ttft"), "RT TPOT median, p99": spread("tpot"),
            "BE output": f"{be['output_throughput'] or 0:,.0f} tokens/s",
            "BE longest wait": "no BE arrived" if be["max_wait_s"] is None else f"{be['max_wait_s']:,.1f} s",
            "KV blocks, peak use": f"{kv['num_blocks']:,}, {kv['peak_usage']:.0%}",
            "computed twice": f"{kv['recomputed_tokens']:,} tokens"}


def sentence(answer: Answer) -> str:
    """An answer in words, for those who cannot see the picture."""
    return f"{answer['policy']}: " + "; ".join(f"{name} {value}" for name, value in facts(answer).items())


def answers_svg(answers: Sequence[Answer], chosen: int, policies: Sequence[str]) -> str:
    """BE tokens per second to the right, RT on time upwards: all answers pale, the chosen one bold, with its numbers.

    Args:
        policies: their order determines the marker of each.
    """
    most = max(1.0, *(answer["classes"]["be"]["output_throughput"] or 0.0 for answer in answers)) * 1.1
    order = [i for i in range(len(answers)) if i != chosen] + [chosen]  # the chosen one on top
    parts = [_axes(most)]
    parts += [_mark(answers[i], most, policies, i == chosen) for i in order]
    x = LEFT + PLANE_W + 26
    for place, (name, value) in enumerate(facts(answers[chosen]).items()):
        y = TOP + 8 + 21 * place
        parts.append(f'<text x="{x}" y="{y}" class="quiet">{escape(name)}</text>'
                     f'<text x="{WIDTH - 4}" y="{y}" text-anchor="end" class="value">{escape(value)}</text>')
    for place, policy in enumerate(policies):
        y = TOP + 172 + 17 * place
        parts.append(f'<path d="{MARKERS[policy_look(place).marker]}" fill="{policy_look(place).colour}" '
                     f'transform="translate({x + 8} {y - 4}) scale(.8)"/><text x="{x + 22}" y="{y}">{escape(policy)}'
                     "</text>")
    return (f'<svg class="what-if" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="'
            f'{escape(sentence(answers[chosen]))}" xmlns="http://www.w3.org/2000/svg" '
            f'style="width:100%;max-width:{WIDTH}px;background:{PAPER}"><style>'
            f".what-if text{{font:12px {FONT};fill:{INK}}}.what-if .quiet{{fill:{MUTED}}}.what-if .value"
            f'{{font-weight:600}}</style>{"".join(parts)}</svg>')


def _axes(most: float) -> str:
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + PLANE_H * (1 - share)
        parts.append(f'<path d="M{LEFT} {y:g}h{PLANE_W}" stroke="{GRID}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:g}" text-anchor="end" class="quiet">{share:.0%}</text>')
    for value in round_values(0.0, most, 6):
        x = LEFT + PLANE_W * value / most
        parts.append(f'<path d="M{x:.1f} {TOP}v{PLANE_H}" stroke="{GRID}"/><text x="{x:.1f}" y="{TOP + PLANE_H + 16}" '
                     f'text-anchor="middle" class="quiet">{value:g}</text>')
    centre, middle = LEFT + PLANE_W / 2, TOP + PLANE_H / 2
    return "".join(parts) + (
        f'<text x="{centre}" y="{TOP + PLANE_H + 38}" text-anchor="middle">best-effort output, tokens/s</text>'
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">real-time on time</text>')


def _mark(answer: Answer, most: float, policies: Sequence[str], chosen: bool) -> str:
    place = policies.index(answer["policy"]) if answer["policy"] in policies else len(policies)
    look = policy_look(place)
    x = LEFT + PLANE_W * (answer["classes"]["be"]["output_throughput"] or 0.0) / most
    y = TOP + PLANE_H * (1 - (answer["classes"]["rt"]["slo_attainment"] or 0.0))
    ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="15" fill="none" stroke="{INK}" stroke-width="2"/>' if chosen else ""
    said = facts(answer)
    tip = f"{answer['policy']}: {said['RT on time']} of RT on time, BE {said['BE output']}"
    return (f'{ring}<path d="{MARKERS[look.marker]}" transform="translate({x:.1f} {y:.1f})" fill="{look.colour}" '
            f'opacity="{1 if chosen else 0.35}"><title>{escape(tip)}</title></path>')


class WhatIf:
    """Controls over `choices`, a picture, and a function that answers.

    Args:
        choices: one of them is named "policy".
        ask: a question, `{name: value}`, -> its answer; a ValueError is shown as the reason why there is none.
        beforehand: questions to ask now, so that the page can answer them without a kernel; it opens on the first.

    Raises:
        ValueError: no choice is named "policy", nothing is asked beforehand, or a question has a value that its choice
            does not offer.
    """

    def __init__(self, choices: Sequence[Choice], ask: Callable[[Question], Answer],
                 beforehand: Sequence[Question]) -> None:
        self.choices = {choice.name: choice for choice in choices}
        if "policy" not in self.choices:
            raise ValueError(f"one choice must be named 'policy', got {', '.join(self.choices)}")
        if not beforehand:
            raise ValueError("ask at least one question beforehand: the page opens on it")
        self.ask = ask
        self.answers: dict[str, Answer] = {}
        keys = [self.key(question) for question in beforehand]  # all questions are checked before one is answered
        for key in keys:
            self.answer(key)
        self.start = keys[0]

    def key(self, question: Question) -> str:
        """The positions of a question's values, as the page sends them: "1 0 2".

        Raises:
            ValueError: a name or a value that no choice offers.
        """
        if question.keys() != self.choices.keys():
            raise ValueError(f"a question gives {', '.join(self.choices)}; got {', '.join(question)}")
        for name, choice in self.choices.items():
            if question[name] not in choice.values:
                raise ValueError(f"{name}: {question[name]!r} is not offered; choose from {choice.values}")
        return " ".join(str(choice.values.index(question[name])) for name, choice in self.choices.items())

    def question(self, key: str) -> Question:
        """The question that the page means by a key."""
        places = map(int, key.split())
        return {choice.name: choice.values[place] for choice, place in zip(self.choices.values(), places, strict=True)}

    def answer(self, key: str) -> Answer:
        """The answer to a key, asked once."""
        if key not in self.answers:
            self.answers[key] = self.ask(self.question(key))
        return self.answers[key]

    def picture(self, key: str) -> str:
        """An answered question among all that were answered so far."""
        policies = [str(policy) for policy in self.choices["policy"].values]
        return answers_svg(list(self.answers.values()), list(self.answers).index(key), policies)

    def reply(self, key: str) -> list[str]:
        """[key, picture, words] for a question that the page asks: what `static/what_if.js` shows."""
        is_new, start_s = key not in self.answers, time.perf_counter()
        try:
            answer = self.answer(key)
        except ValueError as error:
            return [key, "", f"there is no answer: {error}"]
        took = f" (answered in {time.perf_counter() - start_s:.2f} s)" if is_new else ""
        return [key, self.picture(key), sentence(answer) + took]

    def __repr__(self) -> str:
        return f"what if: {len(self.choices)} choices, {len(self.answers)} settings answered beforehand"

    def to_html(self) -> str:
        """The page with what was asked beforehand; needs no kernel."""
        known = {key: [self.picture(key), sentence(answer)] for key, answer in self.answers.items()}
        places = dict(zip(self.choices, self.start.split(), strict=True))
        controls = "".join(_control(choice, int(places[choice.name])) for choice in self.choices.values())
        body = (f'<div style="display:flex;flex-wrap:wrap;gap:6px 22px;align-items:end">{controls}</div>'
                f'<div role="status" aria-live="polite" style="min-height:4.5em">{escape(known[self.start][1])}</div>'
                f"<div data-picture>{known[self.start][0]}</div>")
        return widget_html("what-if", "what if: the setting and what comes of it", body, {"known": known},
                           ("silence.js", "what_if.js"))

    def still(self) -> str:
        """The picture that the page opens on."""
        return self.picture(self.start)

    def live(self) -> Any:
        """The page as a widget of the running kernel, which answers what was not asked beforehand."""
        import anywidget
        import traitlets

        class Live(anywidget.AnyWidget):  # here, so that the package does without anywidget
            _esm = kernel_script("what_if.js") + "\nexport default { render: live };"
            page = traitlets.Unicode(self.to_html()).tag(sync=True)
            question = traitlets.Unicode().tag(sync=True)
            reply: Any = traitlets.List().tag(sync=True)

        widget = Live()
        widget.observe(lambda change: setattr(widget, "reply", self.reply(change.new)), "question")
        return widget

    def _repr_mimebundle_(self, **kwargs: object) -> dict[str, Any]:
        live, _ = self.live()._repr_mimebundle_()
        return {**live, **notebook_output(repr(self), self.to_html(), self.still())}


def _control(choice: Choice, place: int) -> str:
    """A slider over the places of the values, or a list; each with its label, and the value in words."""
    name, label = escape(choice.name), escape(choice.label)
    shown = [escape(choice.shown(i)) for i in range(len(choice.values))]
    if isinstance(choice.values[0], str):
        options = "".join(f'<option value="{i}"{" selected" if i == place else ""}>{text}</option>'
                          for i, text in enumerate(shown))
        return f'<label>{label}<br><select data-choice="{name}" {OWN_KEYS}>{options}</select></label>'
    return (f'<label>{label}: <b data-value="{name}">{shown[place]}</b><br>'
            f'<input type="range" data-choice="{name}" min="0" max="{len(shown) - 1}" step="1" value="{place}" '
            f'data-shown="{"|".join(shown)}" aria-valuetext="{shown[place]}" style="width:150px" {OWN_KEYS}></label>')
