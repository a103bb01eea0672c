"""`parse`: a scheduler from an expression typed into a shell, without ever running it as Python."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer, lr_scheduler, swa_utils

Value = int | float
Factory = Callable[[Optimizer], Any]
_Function = Callable[[Value], Value]

SCHEDULERS: dict[str, type] = {
    **{name: getattr(lr_scheduler, name) for name in lr_scheduler.__all__ if name != "LRScheduler"},
    "SWALR": swa_utils.SWALR,
}
"""Every scheduler of torch, by name."""


def _round(value: Value) -> int:
    """Only to integers: to a huge negative number of digits, Python's round would not come back."""
    return round(value)


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "int": int,
    "float": float,
    "round": _round,
    **{
        f"math.{function.__name__}": function
        for function in (
            math.acos, math.asin, math.atan, math.atan2, math.ceil, math.cos, math.cosh, math.exp, math.expm1,
            math.fabs, math.floor, math.fmod, math.hypot, math.log, math.log10, math.log1p, math.log2, math.pow,
            math.sin, math.sinh, math.sqrt, math.tan, math.tanh, math.trunc,
        )
    },
}  # fmt: skip
_CONSTANTS = {f"math.{name}": getattr(math, name) for name in ("pi", "e", "tau", "inf")}

_BITS = 1024  # an int beyond this does not convert to a float any more, and no rate can be made of it
_LENGTH, _DEPTH = 4000, 60  # of the expression: characters, levels of nesting


def parse(expression: str) -> Factory:
    """Read a scheduler as one would write it in Python, ``"CosineAnnealingLR(T_max=50)"``, without the optimizer.

    The expression is parsed and never evaluated: it is made of the names of torch's schedulers, of numbers, strings,
    True, False, None and lists of these, of schedulers within `SequentialLR` and `ChainedScheduler`, and, where a
    scheduler takes a function (``lr_lambda``, ``scale_fn``), of a lambda over one number: ``lambda epoch: 0.95 **
    epoch``. A lambda has ``+ - * / // % **``, comparisons, ``and or not``, ``... if ... else ...``, abs, min, max, int,
    float, round and the functions of math. None of its numbers grows beyond a float, so it always ends at once.

    Arguments:
        expression: the source text. A module path before a name, and ``optimizer`` as first argument, are accepted.

    Returns:
        A function that makes the scheduler for an optimizer. It raises what torch raises about the arguments' values.

    Raises:
        ValueError: the expression is something else. The message names what is wrong, what comes nearest, and the
            signature.
    """
    if len(expression) > _LENGTH:
        raise ValueError(f"a schedule takes at most {_LENGTH} characters, not {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"cannot read {_short(expression)}: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError):
        raise ValueError(f"cannot read {_short(expression)}: nested too deeply, or a NUL inside") from None
    if _depth(tree) > _DEPTH:
        raise ValueError(f"cannot read {_short(expression)}: nested too deeply")
    return _scheduler(tree)


def signature(name: str) -> str:
    """How to write scheduler `name`, without its optimizer: ``"StepLR(step_size, gamma=0.1, last_epoch=-1)"``."""
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in _parameters(name).values()]
    return f"{name}{inspect.Signature(parameters)}"


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    found = inspect.signature(SCHEDULERS[name].__init__).parameters  # type: ignore[misc]
    return {key: parameter for key, parameter in found.items() if key not in ("self", "optimizer")}


def _depth(tree: ast.expr) -> int:
    depth = 0
    level: list[ast.AST] = [tree]
    while level:
        depth, level = depth + 1, [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _shown(node: ast.AST) -> str:
    return _short(ast.unparse(node))


def _nearest(name: str, options: Iterable[str]) -> str | None:
    """The option that a mistyped or half-remembered name most likely means."""
    lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    inside = [option for option in lower if name.lower() in option]
    return lower[close[0]] if close else lower[inside[0]] if inside else None


def _scheduler(node: ast.expr) -> Factory:
    """``Name(arguments)`` -> what makes it. All names are looked up and bound before anything is made."""
    if not isinstance(node, ast.Call):
        example = f"{node.id}(...)" if isinstance(node, ast.Name) else "StepLR(30)"
        raise ValueError(f"a schedule is a call of a scheduler, such as {example}; this is {_shown(node)}")
    path = ast.unparse(node.func)
    name = path.rpartition(".")[2] if path.replace(".", "").isidentifier() else path
    if name not in SCHEDULERS:
        nearest = _nearest(name, SCHEDULERS)
        hint = f"did you mean {signature(nearest)}? " if nearest else ""
        raise ValueError(f"torch has no scheduler {name!r}; {hint}There are {', '.join(sorted(SCHEDULERS))}")
    makers = {key: _argument(name, key, value) for key, value in _bind(name, node).items()}

    def factory(optimizer: Optimizer) -> Any:
        return SCHEDULERS[name](optimizer=optimizer, **{key: make(optimizer) for key, make in makers.items()})

    return factory


def _bind(name: str, call: ast.Call) -> dict[str, ast.expr]:
    """The arguments of a call by name, checked against the scheduler's signature."""
    parameters = _parameters(name)
    usage = f"; the signature is {signature(name)}"
    positional = [node for node in call.args if not _is_optimizer(node)]
    if len(positional) > len(parameters):
        raise ValueError(f"{name} takes at most {len(parameters)} arguments, not {len(positional)}{usage}")
    bound = dict(zip(parameters, positional, strict=False))
    for keyword in call.keywords:
        if keyword.arg == "optimizer" and _is_optimizer(keyword.value):
            continue
        if keyword.arg is None or keyword.arg not in parameters:
            nearest = _nearest(keyword.arg or "", parameters)
            hint = f", did you mean {nearest!r}?" if nearest and keyword.arg else ""
            raise ValueError(f"{name} has no argument {keyword.arg or '**'!r}{hint}{usage}")
        if keyword.arg in bound:
            raise ValueError(f"{name} is given {keyword.arg!r} twice{usage}")
        bound[keyword.arg] = keyword.value
    missing = [key for key, one in parameters.items() if one.default is one.empty and key not in bound]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}{usage}")
    return bound


def _is_optimizer(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("optimizer", "opt")


def _argument(name: str, key: str, node: ast.expr) -> Factory:
    """One argument's value, made anew for each scheduler so that none shares a list with another."""
    if isinstance(node, ast.List | ast.Tuple):
        kind = list if isinstance(node, ast.List) else tuple
        items = [_argument(name, key, item) for item in node.elts]
        return lambda optimizer: kind(item(optimizer) for item in items)
    if key == "schedulers":
        return _scheduler(node)
    if key in ("lr_lambda", "scale_fn") and isinstance(node, ast.Lambda):
        function = _lambda(node)
        return lambda _: function
    sign: Callable[[Any], Any] = operator.pos
    literal = node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        literal, sign = node.operand, _UNARY[type(node.op)]
    if isinstance(literal, ast.Constant) and (
        type(literal.value) in (int, float)
        or (literal is node and (literal.value is None or isinstance(literal.value, bool | str)))
    ):
        value = literal.value if literal is node else sign(literal.value)
        return lambda _: value
    raise ValueError(
        f"{name}'s {key} must be written out as a number, a string, True, False, None or a list of these, "
        f"not {_shown(node)}; the signature is {signature(name)}"
    )


def _lambda(node: ast.Lambda) -> _Function:
    arguments = node.args
    names = [argument.arg for argument in arguments.args]
    if len(names) != 1 or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        raise ValueError(f"a lambda of a schedule takes one number, 'lambda epoch: ...'; this is {_shown(node)}")
    return _arithmetic(node.body, names[0])


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, int) and isinstance(exponent, int) and (abs(base).bit_length() - 1) * exponent >= _BITS:
        raise OverflowError(f"{base} ** {exponent} is too large for a float")
    result: Value = base**exponent
    if isinstance(result, complex):
        raise ValueError(f"{base} ** {exponent} is not a real number")
    return result


_UNARY: dict[type[ast.AST], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_COMPARE: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


def _small(value: Value) -> Value:
    """The value, unless it is an int that no float can hold: that is what keeps every operation short."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise OverflowError("a number in the lambda is too large for a float")
    return value


def _arithmetic(node: ast.expr, name: str) -> _Function:
    """Arithmetic of the one number called `name` -> a function of it, with Python's own meaning."""

    def inner(child: ast.expr) -> _Function:
        return _arithmetic(child, name)

    match node:
        case ast.Constant(value=int() | float() as value):
            constant = _small(value)
            return lambda _: constant
        case ast.Name() if node.id == name:
            return lambda x: x
        case ast.Attribute() if (dotted := ast.unparse(node)) in _CONSTANTS:
            return lambda _: _CONSTANTS[dotted]
        case ast.UnaryOp(op=op) if type(op) in _UNARY:
            apply, operand = _UNARY[type(op)], inner(node.operand)
            return lambda x: apply(operand(x))
        case ast.BinOp(op=op) if type(op) in _BINARY:
            combine, left, right = _BINARY[type(op)], inner(node.left), inner(node.right)
            return lambda x: _small(combine(left(x), right(x)))
        case ast.Compare(ops=ops) if all(type(op) in _COMPARE for op in ops):
            first = inner(node.left)
            tests = [(_COMPARE[type(op)], inner(term)) for op, term in zip(ops, node.comparators, strict=True)]

            def compare(x: Value) -> bool:
                left = first(x)
                for test, term in tests:  # as in Python, what follows a comparison that fails is not looked at
                    right = term(x)
                    if not test(left, right):
                        return False
                    left = right
                return True

            return compare
        case ast.BoolOp(op=op):
            parts, stop = [inner(part) for part in node.values], isinstance(op, ast.Or)

            def connect(x: Value) -> Value:
                value: Value = not stop
                for part in parts:
                    value = part(x)
                    if bool(value) is stop:
                        break
                return value

            return connect
        case ast.IfExp():
            test, then, other = inner(node.test), inner(node.body), inner(node.orelse)
            return lambda x: then(x) if test(x) else other(x)
        case ast.Call(keywords=[]) if (called := ast.unparse(node.func)) in _FUNCTIONS:
            function, given = _FUNCTIONS[called], [inner(argument) for argument in node.args]
            return lambda x: _small(function(*(argument(x) for argument in given)))
    raise ValueError(_unknown(node, name))


def _unknown(node: ast.expr, name: str) -> str:
    word = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    known = [name, *_FUNCTIONS, *_CONSTANTS]
    nearest = _nearest(word, known) if isinstance(node, ast.Name | ast.Attribute | ast.Call) else None
    return (
        f"the lambda of a schedule cannot use {_shown(node)}{f'; did you mean {nearest}?' if nearest else ''}; it has "
        f"{name}, numbers, + - * / // % **, comparisons, and, or, not, if ... else, "
        f"{', '.join([*_FUNCTIONS, *_CONSTANTS])}"
    )
