"""PTX text becomes functions: instructions in order, labels, register types, shared and local variables, parameters.

It knows PTX's grammar and no instruction's meaning. What it does not know it refuses with the line; nothing is skipped
but debugging sections. Names declared inside braces (inline assembly does that) are made unique, so a function's
instructions form one flat list.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

_TOKEN = re.compile(r'"[^"\n]*"|-?[\w$%.]+|[,;:{}\[\]()@!|+<>=]')
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINE_DIRECTIVES = (".version", ".target", ".address_size", ".file", ".loc")
_LINKAGE = (".visible", ".extern", ".weak", ".common")
_SPACES = (".global", ".const", ".shared", ".local")


class PtxError(ValueError):
    """A PTX text that cannot be run: a line that is not understood, or an instruction that is not supported."""


@dataclass(frozen=True)
class Register:
    """A register of the function; `type` is as declared, e.g. "b32", "f32", "pred"."""

    name: str
    type: str


@dataclass(frozen=True)
class Immediate:
    """A number in the text. `bits` of a float are those written (0f... or 0d...), `width` 32 or 64; 0 for integers."""

    value: int
    width: int = 0


@dataclass(frozen=True)
class Special:
    """A special register such as %tid.x, or WARP_SZ."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A label, a variable or a parameter, by name."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]: a register, or a variable or parameter."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    parts: tuple[Operand, ...]


Operand = Register | Immediate | Special | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: as written, e.g. "ld.global.v4.f32".
        operands: in the order written; a second destination ("d|p") follows the first.
        guard: the predicate that says which threads execute it; `negated` if written @!p.
        line: in the PTX text, from 1.
        source: file and line of the .cu text, from .loc; None without line information.
    """

    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    source: tuple[str, int] | None


@dataclass(frozen=True)
class Variable:
    """A variable outside of registers; `values` are its initial bytes, shorter than `size` if the rest is zero."""

    name: str
    space: str
    size: int
    align: int
    values: bytes = b""


@dataclass
class Function:
    """An entry function."""

    name: str
    parameters: list[tuple[str, str]]  # (name, type)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of the instruction that follows
    variables: list[Variable] = field(default_factory=list)


@dataclass
class Module:
    """A PTX text: its entry functions and the variables they share."""

    functions: dict[str, Function]
    variables: list[Variable]


def parse(text: str) -> Module:
    """Reads a PTX text.

    Raises:
        PtxError: with the line that was not understood.
    """
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str) -> None:
        blank = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        self._tokens: list[tuple[str, int]] = []
        for number, line in enumerate(blank.splitlines(), 1):
            self._tokens += [(token, number) for token in _TOKEN.findall(line)]
        self._at = 0
        self._files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"\n]*/)?([^"\n]*)"', blank))  # they stand at the end
        self._source: tuple[str, int] | None = None
        self._scopes: list[dict[str, Register]] = []
        self._families: list[dict[str, str]] = []  # %r<40> declares a family: prefix -> type
        self._count = 0

    # ----- tokens

    def _peek(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def _next(self, wanted: str = "") -> str:
        token = self._peek()
        if not token or (wanted and token != wanted):
            raise self._error(f"expected {wanted or 'more'!r}, found {token or 'the end'!r}")
        self._at += 1
        return token

    def _take(self, token: str) -> bool:
        if self._peek() != token:
            return False
        self._at += 1
        return True

    @property
    def _line(self) -> int:
        return self._tokens[min(self._at, len(self._tokens) - 1)][1] if self._tokens else 0

    def _error(self, message: str) -> PtxError:
        return PtxError(f"PTX line {self._line}: {message}")

    def _number(self) -> int:
        token = self._next()
        try:
            return int(token.removesuffix("U"), 0)
        except ValueError:
            raise self._error(f"expected a number, found {token!r}") from None

    # ----- module level

    def module(self) -> Module:
        module = Module({}, [])
        while self._peek():
            if self._directive_of_a_line():
                continue
            if self._peek() == ".section":
                self._skip_section()
                continue
            while self._peek() in _LINKAGE:
                self._next()
            if self._take(".entry"):
                function = self._entry()
                module.functions[function.name] = function
            elif self._peek() in _SPACES:
                module.variables.append(self._variable())
            else:
                raise self._error(f"{self._peek()!r} is not understood here")
        return module

    def _directive_of_a_line(self) -> bool:
        """Takes .version, .file, .loc and the like, which end with their line."""
        if self._peek() not in _LINE_DIRECTIVES:
            return False
        first, line, words = self._next(), self._tokens[self._at - 1][1], []
        while self._at < len(self._tokens) and self._tokens[self._at][1] == line:
            words.append(self._next())
        if first == ".loc":
            self._source = (self._files.get(words[0], words[0]), int(words[1]))
        return True

    def _skip_section(self) -> None:
        while self._next() != "{":
            pass
        while self._next() != "}":
            pass

    def _entry(self) -> Function:
        function = Function(self._next(), [])
        if self._take("("):
            while not self._take(")"):
                self._next(".param")
                kind = self._next().lstrip(".")
                while self._peek().startswith("."):  # .ptr .align n
                    if self._next() == ".align":
                        self._next()
                function.parameters.append((self._next(), kind))
                self._take(",")
        while self._peek().startswith("."):  # .maxntid x, y, z and the like bound what a launch may ask for
            self._next()
            while self._peek() not in ("{", "") and not self._peek().startswith("."):
                self._next()
        self._next("{")
        self._source = None
        self._body(function)
        return function

    def _variable(self) -> Variable:
        space, align = self._next().lstrip("."), 1
        if self._take(".align"):
            align = self._number()
        kind = self._next().lstrip(".")
        width = _width(kind)
        if width is None:
            raise self._error(f"variables of type .{kind} are not understood")
        name, count = self._next(), 1
        while self._take("["):
            count = 0 if self._peek() == "]" else count * self._number()
            self._next("]")
        values = b""
        if self._take("="):
            listed = self._take("{")
            values = self._initial(kind, width)
            while listed and not self._take("}"):
                self._next(",")
                values += self._initial(kind, width)
        self._next(";")
        return Variable(name, space, count * width, max(align, width), values)

    def _initial(self, kind: str, width: int) -> bytes:
        number = _immediate(self._next())
        if number is None:
            raise self._error("only numbers can be initial values")
        return (number.value & ((1 << 8 * width) - 1)).to_bytes(width, "little")

    # ----- function bodies

    def _body(self, function: Function) -> None:
        self._scopes, self._families = [{}], [{}]
        while self._scopes:
            if self._directive_of_a_line():
                continue
            token = self._peek()
            if token == "{":
                self._next()
                self._scopes.append({})
                self._families.append({})
            elif token == "}":
                self._next()
                self._scopes.pop()
                self._families.pop()
            elif token == ".reg":
                self._registers()
            elif token in (".shared", ".local"):
                function.variables.append(self._variable())
            elif token == ".pragma":
                while self._next() != ";":
                    pass
            elif self._tokens[self._at + 1:self._at + 2] and self._tokens[self._at + 1][0] == ":":
                function.labels[self._next()] = len(function.instructions)
                self._next(":")
            else:
                function.instructions.append(self._instruction())

    def _registers(self) -> None:
        self._next(".reg")
        kind = self._next().lstrip(".")
        while True:
            name = self._next()
            if self._take("<"):
                self._number()
                self._next(">")
                self._families[-1][name] = kind
            else:
                self._count += 1
                unique = name if len(self._scopes) == 1 else f"{name}'{self._count}"
                self._scopes[-1][name] = Register(unique, kind)
            if self._take(";"):
                return
            self._next(",")

    def _instruction(self) -> Instruction:
        guard, negated, line = None, False, self._line
        if self._take("@"):
            negated = self._take("!")
            found = self._operand()
            if not isinstance(found, Register) or found.type != "pred":
                raise self._error("a guard must be a predicate register")
            guard = found
        opcode, operands = self._next(), []
        if not re.fullmatch(r"[a-z][\w.]*", opcode):
            raise self._error(f"{opcode!r} is no instruction")
        while not self._take(";"):
            operands.append(self._operand())
            if self._peek() not in (",", "|", ";"):
                raise self._error(f"{self._peek()!r} after an operand of {opcode}")
            if self._peek() in (",", "|"):
                self._next()
        return Instruction(opcode, tuple(operands), guard, negated, line, self._source)

    def _operand(self) -> Operand:
        if self._take("{"):
            parts = [self._operand()]
            while self._take(","):
                parts.append(self._operand())
            self._next("}")
            return Vector(tuple(parts))
        if self._take("["):
            base, offset = self._operand(), 0
            if self._take("+") or re.fullmatch(r"-\d+", self._peek()):
                offset = self._number()
            self._next("]")
            if not isinstance(base, Register | Symbol | Immediate):
                raise self._error("an address is a register, a variable or a number, and an offset")
            return Address(base, offset)
        token = self._next()
        if (number := _immediate(token)) is not None:
            return number
        if (register := self._register(token)) is not None:
            return register
        if token.startswith("%") or token == "WARP_SZ":
            return Special(token)
        if not re.fullmatch(r"[\w$.]+", token):
            raise self._error(f"{token!r} is no operand")
        return Symbol(token)

    def _register(self, token: str) -> Register | None:
        for scope, families in zip(reversed(self._scopes), reversed(self._families), strict=True):
            if token in scope:
                return scope[token]
            family = token.rstrip("0123456789")
            if family != token and family in families:
                return Register(token, families[family])
        return None


def _width(kind: str) -> int | None:
    """Bytes of a fundamental type."""
    match = re.fullmatch(r"[bsuf](8|16|32|64)", kind)
    return int(match[1]) // 8 if match else None


def _immediate(token: str) -> Immediate | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", token):
        return Immediate(int(token[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", token):
        return Immediate(int(token[2:], 16), 64)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", token):
        return Immediate(int(token.removesuffix("U"), 0 if "x" in token else 10))
    if re.fullmatch(r"-?\d+\.\d+", token):
        return Immediate(struct.unpack("<Q", struct.pack("<d", float(token)))[0], 64)
    return None
