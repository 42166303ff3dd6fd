"""Rebuild TIR from Python: a visitor that returns the same object where nothing below it changed."""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Call

# Fields of each expression class that hold expressions, in the order of its constructor.
_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max,
    tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
    tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor, tirx.LShift, tirx.RShift,
)  # fmt: skip


class Rewriter:
    """Walks statements and expressions bottom-up. Subclasses override `call`, `load` or `store`, or a visit."""

    def call(self, call: Call) -> tirx.Expr:
        """What stands for a call whose arguments have been rewritten."""
        return call

    def load(self, load: tirx.Expr) -> tirx.Expr:
        """What stands for a read of a buffer whose indices have been rewritten."""
        return load

    def expr(self, e: Any) -> Any:
        """Rewrite an expression."""
        if isinstance(e, Call):
            args = [self.expr(a) for a in e.args]
            return self.call(e if _same(args, e.args) else Call(e.op, args, e.attrs, ty_args=e.ty_args, ret_ty=e.ty))
        if isinstance(e, _BINARY):
            a, b = self.expr(e.a), self.expr(e.b)
            return e if a.same_as(e.a) and b.same_as(e.b) else type(e)(a, b)
        if isinstance(e, tirx.Cast):
            value = self.expr(e.value)
            return e if value.same_as(e.value) else tirx.Cast(e.ty.dtype, value)
        if isinstance(e, tirx.Select):
            parts = [self.expr(p) for p in (e.condition, e.true_value, e.false_value)]
            return e if _same(parts, (e.condition, e.true_value, e.false_value)) else tirx.Select(*parts)
        if isinstance(e, tirx.Not | tirx.BitwiseNot):
            a = self.expr(e.a)
            return e if a.same_as(e.a) else type(e)(a)
        if isinstance(e, tirx.Broadcast):
            value = self.expr(e.value)
            return e if value.same_as(e.value) else tirx.Broadcast(value, e.lanes)
        if isinstance(e, tirx.Ramp):
            base, stride = self.expr(e.base), self.expr(e.stride)
            return e if base.same_as(e.base) and stride.same_as(e.stride) else tirx.Ramp(base, stride, e.lanes)
        if isinstance(e, tirx.Let):
            value, body = self.expr(e.value), self.expr(e.body)
            return e if value.same_as(e.value) and body.same_as(e.body) else tirx.Let(e.var, value, body)
        if isinstance(e, tirx.Shuffle):
            vectors = [self.expr(v) for v in e.vectors]
            return e if _same(vectors, e.vectors) else tirx.Shuffle(vectors, e.indices)
        if is_load(e):
            indices = [self.expr(i) for i in e.indices]
            return self.load(e if _same(indices, e.indices) else tirx.BufferLoad(e.source, indices))
        return e

    def store(self, store: tirx.BufferStore) -> tirx.Stmt:
        """What stands for a write to a buffer whose value and indices have been rewritten."""
        return store

    def stmt(self, s: Any) -> Any:
        """Rewrite a statement."""
        if isinstance(s, tirx.BufferStore):
            value, indices = self.expr(s.value), [self.expr(i) for i in s.indices]
            same = value.same_as(s.value) and _same(indices, s.indices)
            return self.store(s if same else tirx.BufferStore(s.buffer, value, indices))
        if isinstance(s, tirx.SeqStmt):
            seq = [self.stmt(x) for x in s.seq]
            flat = [y for x in seq for y in (x.seq if isinstance(x, tirx.SeqStmt) else [x])]
            return s if _same(seq, s.seq) else tirx.SeqStmt(flat)
        if isinstance(s, tirx.For):
            body = self.stmt(s.body)
            if body.same_as(s.body):
                return s
            return tirx.For(s.loop_var, s.min, s.extent, s.kind, body, s.thread_binding, s.annotations, s.step)
        if isinstance(s, tirx.IfThenElse):
            condition, then = self.expr(s.condition), self.stmt(s.then_case)
            other = None if s.else_case is None else self.stmt(s.else_case)
            same = condition.same_as(s.condition) and then.same_as(s.then_case)
            if same and (other is None or other.same_as(s.else_case)):
                return s
            return tirx.IfThenElse(condition, then, other)
        if isinstance(s, tirx.Bind):
            value = self.expr(s.value)
            return s if value.same_as(s.value) else tirx.Bind(s.var, value)
        if isinstance(s, tirx.AttrStmt):
            body = self.stmt(s.body)
            return s if body.same_as(s.body) else tirx.AttrStmt(s.node, s.attr_key, s.value, body)
        if isinstance(s, tirx.While):
            condition, body = self.expr(s.condition), self.stmt(s.body)
            return s if condition.same_as(s.condition) and body.same_as(s.body) else tirx.While(condition, body)
        if isinstance(s, tirx.Evaluate):
            value = self.expr(s.value)
            return s if value.same_as(s.value) else tirx.Evaluate(value)
        if isinstance(s, s_tir.SBlockRealize):
            block = self.block(s.block)
            return s if block.same_as(s.block) else s_tir.SBlockRealize(s.iter_values, s.predicate, block)
        return s

    def block(self, b: s_tir.SBlock) -> s_tir.SBlock:
        """Rewrite the body and the initial value of a block."""
        body = self.stmt(b.body)
        init = None if b.init is None else self.stmt(b.init)
        if body.same_as(b.body) and (init is None or init.same_as(b.init)):
            return b
        return s_tir.SBlock(
            b.iter_vars, b.reads, b.writes, b.name_hint, body, init, b.alloc_buffers, b.match_buffers, b.annotations
        )


def is_load(e: Any) -> bool:
    """Whether an expression reads an element of a buffer."""
    return type(e).__name__ == "TensorLoad"


def _same(new: Any, old: Any) -> bool:
    return all(a.same_as(b) for a, b in zip(new, old, strict=True))


def children(node: Any) -> list[Any]:
    """Expressions and statements directly below a node."""
    if isinstance(node, Call):
        return list(node.args)
    if isinstance(node, _BINARY):
        return [node.a, node.b]
    if isinstance(node, tirx.Cast | tirx.Broadcast):
        return [node.value]
    if isinstance(node, tirx.Select):
        return [node.condition, node.true_value, node.false_value]
    if isinstance(node, tirx.Not | tirx.BitwiseNot):
        return [node.a]
    if isinstance(node, tirx.Let):
        return [node.value, node.body]
    if isinstance(node, tirx.BufferStore):
        return [node.value, *node.indices]
    if isinstance(node, tirx.SeqStmt):
        return list(node.seq)
    if isinstance(node, tirx.IfThenElse):
        return [node.condition, node.then_case, *([] if node.else_case is None else [node.else_case])]
    if isinstance(node, tirx.For):
        return [node.body]
    return list(node.indices) if is_load(node) else []
