"""Write a straight-line Relax function again, binding by binding: how every rewrite here is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tvm
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Constant, Dataflow

# What stands for a binding after the rewrite: an expression, or None to leave the binding out.
Rewrite = Callable[[relax.VarBinding, relax.Expr, relax.BlockBuilder], "relax.Expr | None"]


def substitute(expr: relax.Expr, env: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """The expression with variables replaced; the very same object where nothing changes."""
    if isinstance(expr, relax.Var):
        return env.get(expr, expr)
    if isinstance(expr, relax.Tuple):
        fields = [substitute(f, env) for f in expr.fields]
        return expr if _same(fields, expr.fields) else relax.Tuple(fields)
    if isinstance(expr, relax.TupleGetItem):
        value = substitute(expr.tuple_value, env)
        if isinstance(value, relax.Tuple):
            return value.fields[expr.index]
        return expr if value.same_as(expr.tuple_value) else relax.TupleGetItem(value, expr.index)
    if isinstance(expr, relax.Call):
        args = [substitute(a, env) for a in expr.args]
        return expr if _same(args, expr.args) else relax.Call(expr.op, args, expr.attrs, expr.ty_args)
    return expr


def rebuild(module: IRModule, rewrite: Rewrite) -> IRModule:
    """Build `main` again, asking `rewrite` for every binding with its variables already replaced.

    The answer may name variables of the old function. What is left without a use afterwards is removed; functions that
    `main` calls are kept as they are.
    """
    flow = Dataflow(module["main"])
    builder = relax.BlockBuilder()
    env: dict[relax.Var, relax.Expr] = {}
    main = flow.function
    with builder.function("main", list(main.params)):
        with builder.dataflow():
            for binding in flow.bindings:
                value = substitute(binding.value, env)
                if isinstance(value, relax.Call):
                    value = builder.normalize(value)  # a new call has no type yet
                new = rewrite(binding, value, builder)
                if new is None:
                    continue
                new = substitute(new, env)
                if not isinstance(new, relax.Var | Constant | relax.Tuple):
                    new = builder.emit(new)
                env[binding.var] = new
            result = builder.emit_output(substitute(main.body.body, env))
        builder.emit_func_output(result)
    rebuilt = builder.finalize()
    for name, function in module.functions.items():
        if name.name_hint != "main":
            rebuilt[name] = function
    return relax.transform.DeadCodeElimination()(rebuilt)


def _same(new: list[relax.Expr], old: tvm.ir.Array) -> bool:
    return all(a.same_as(b) for a, b in zip(new, old, strict=True))
