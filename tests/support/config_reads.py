"""Finds which keys of the config the code reads, by inferring the types of expressions from annotations."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from cmscale.config import Config
from cmscale.config.keys import alternatives, is_section
from cmscale.config.methods import AnyMethod
from cmscale.config.section import Section

Types = frozenset[str]
"""Names of classes that an expression may have."""

NOTHING: Types = frozenset()


def sections(model: type[BaseModel] = Config) -> dict[str, type[BaseModel]]:
    """Every section class of the config by name."""
    found = {model.__name__: model}
    for field in model.model_fields.values():
        for part in alternatives(field.annotation):
            if is_section(part):
                found |= sections(part)
    return found


class Reads(ast.NodeVisitor):
    """Collects `(section class, field)` for every attribute that is loaded from an expression of a section's type.

    Types come from annotations of parameters, variables, attributes and results, from assignments, and from `match`
    cases. Validators are not visited: checking a value is not using it.
    """

    def __init__(self, roots: list[Path]) -> None:
        self.sections = sections()
        self.bases = {
            base.__name__: frozenset(name for name, cls in self.sections.items() if issubclass(cls, base))
            for cls in self.sections.values()
            for base in cls.__mro__
            if issubclass(base, Section)
        }
        self.aliases = {"Method": frozenset(cls.__name__ for cls in get_args(AnyMethod))}
        self.aliases["AnyMethod"] = self.aliases["Method"]
        self.attributes: dict[str, dict[str, Types]] = {}
        self.results: dict[str, Types] = {}
        self.found: set[tuple[str, str]] = set()
        self.scopes: list[dict[str, Types]] = [{}]
        self.owner: list[str] = []
        trees = [ast.parse(path.read_text()) for root in roots for path in sorted(root.rglob("*.py"))]
        for _ in range(2):  # attributes of classes that are defined later are known in the second pass
            for tree in trees:
                self._declare(tree)
        for tree in trees:
            self.scopes = [{}]
            self.visit(tree)

    # Types -------------------------------------------------------------------------------------------------

    def of_annotation(self, node: ast.expr | None) -> Types:
        """The classes that an annotation names, unions and optional types included."""
        if node is None:
            return NOTHING
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.of_annotation(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id) or frozenset({node.id})
        if isinstance(node, ast.Attribute):
            return frozenset({node.attr})
        if isinstance(node, ast.BinOp):
            return self.of_annotation(node.left) | self.of_annotation(node.right)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Annotated":
            assert isinstance(node.slice, ast.Tuple)
            return self.of_annotation(node.slice.elts[0])
        return NOTHING

    def of(self, node: ast.expr) -> Types:
        """The classes that an expression may have; empty if nothing is known."""
        match node:
            case ast.Name(id=name):
                return next((scope[name] for scope in reversed(self.scopes) if name in scope), NOTHING)
            case ast.Attribute(value=value, attr=attr):
                found = [self._attribute(owner, attr) for owner in self.of(value)]
                return frozenset().union(*found)
            case ast.Call(func=ast.Attribute(value=value, attr="model_copy")):
                return self.of(value)
            case ast.Call(func=ast.Name(id=name)):
                return self.results.get(name) or frozenset({name})
            case ast.Call(func=ast.Attribute(attr=name)):
                return self.results.get(name, NOTHING)
            case ast.IfExp(body=body, orelse=orelse):
                return self.of(body) | self.of(orelse)
            case ast.BoolOp(values=values):
                return frozenset().union(*map(self.of, values))
        return NOTHING

    def _attribute(self, owner: str, attr: str) -> Types:
        for name in self.bases.get(owner, frozenset({owner})):
            if (cls := self.sections.get(name)) and (field := cls.model_fields.get(attr)):
                return frozenset(part.__name__ for part in alternatives(field.annotation) if is_section(part))
        return self.attributes.get(owner, {}).get(attr, NOTHING)

    def _declare(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                self.results.setdefault(node.name, self.of_annotation(node.returns))
            if not isinstance(node, ast.ClassDef):
                continue
            known = self.attributes.setdefault(node.name, {})
            for base in node.bases:
                known.update(self.attributes.get(ast.unparse(base), {}))
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    known[item.target.id] = self.of_annotation(item.annotation)
                if isinstance(item, ast.FunctionDef):
                    if any(isinstance(each, ast.Name) and "property" in each.id for each in item.decorator_list):
                        known[item.name] = self.of_annotation(item.returns)
                    parameters = dict(self._parameters(item))
                    for statement in ast.walk(item):
                        match statement:
                            case ast.Assign(
                                targets=[ast.Attribute(value=ast.Name(id="self"), attr=attr)], value=ast.Name(id=name)
                            ) if name in parameters:
                                known[attr] = parameters[name]

    def _parameters(self, node: ast.FunctionDef) -> Iterator[tuple[str, Types]]:
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            yield argument.arg, self.of_annotation(argument.annotation)

    # Reads -------------------------------------------------------------------------------------------------

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.owner.append(node.name)
        self.generic_visit(node)
        self.owner.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if any("validator" in ast.unparse(each) for each in node.decorator_list):
            return
        scope = dict(self._parameters(node))
        if self.owner:
            scope["self"] = scope["cls"] = self.bases.get(self.owner[-1], frozenset({self.owner[-1]}))
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._bind(target, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self.scopes[-1][node.target.id] = self.of_annotation(node.annotation)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._bind(node.target, node.value)

    def visit_match_case(self, node: ast.match_case) -> None:
        self.scopes.append({})
        match node.pattern:
            case ast.MatchClass(cls=ast.Name(id=name)) if name in self.sections:
                self.scopes[-1]["method"] = frozenset({name})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return
        for owner in self.of(node.value):
            for name in self.bases.get(owner, NOTHING):
                if node.attr in self.sections[name].model_fields:
                    self.found.add((name, node.attr))

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = self.of(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=True):
                self._bind(one, other)


def unread_leaves(roots: list[Path]) -> list[str]:
    """`Section.field` of every leaf of the config that no code under `roots` reads."""
    reads = Reads(roots)
    return [
        f"{name}.{field}"
        for name, cls in reads.sections.items()
        for field, info in cls.model_fields.items()
        if not any(is_section(part) for part in alternatives(info.annotation)) and (name, field) not in reads.found
    ]
