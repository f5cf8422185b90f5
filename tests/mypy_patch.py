"""Lets mypy see a method that fastcore's `@patch` adds to a class of the same module: it is checked as if it stood in the class."""

from collections.abc import Callable

from mypy.nodes import CallExpr, Decorator, Expression, FuncDef, NameExpr, PassStmt
from mypy.plugin import ClassDefContext, Plugin
from mypy.types import UnboundType

KINDS = {"as_prop": "property", "cls_method": "classmethod", "static_method": "staticmethod"}


def kind_of(decorator: Expression) -> str | None:
    "The builtin decorator that `@patch` or `@patch(as_prop=True)` stands for; empty for a plain method, None for others."
    call = isinstance(decorator, CallExpr)
    name = decorator.callee if call else decorator
    if not (isinstance(name, NameExpr) and name.name == "patch"):
        return None
    return "".join(KINDS[option] for option in decorator.arg_names if option) if call else ""


def patched_class(function: FuncDef) -> str:
    "The name of the class in the annotation of a function's first argument; empty where there is none."
    types = getattr(function.unanalyzed_type, "arg_types", [])
    return types[0].name if types and isinstance(types[0], UnboundType) else ""


def move_methods(context: ClassDefContext) -> None:
    "Put the module's patched functions into the body of their class, before that is analysed."
    module = context.api.modules[context.api.cur_mod_id]
    for at, node in enumerate(module.defs):
        if not isinstance(node, Decorator) or patched_class(node.func) != context.cls.name:
            continue
        kind = kind_of(node.decorators[0])
        if kind is None:
            continue
        if kind:
            node.decorators[0] = node.original_decorators[0] = NameExpr(kind)
        else:
            node.func.is_decorated = False
        context.cls.defs.body.append(node if kind else node.func)
        module.defs[at] = PassStmt()


class PatchPlugin(Plugin):
    def get_customize_class_mro_hook(self, fullname: str) -> Callable[[ClassDefContext], None] | None:
        return move_methods


def plugin(version: str) -> type[Plugin]:
    return PatchPlugin
