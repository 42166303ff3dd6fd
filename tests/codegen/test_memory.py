"""The arena: nothing that lives at the same time overlaps, and little is wasted."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.codegen.memory import aligned, plan_memory
from graphopt.codegen.steps import ALIGNMENT, Buffer, Step, StepProgram


@st.composite
def programs(draw: st.DrawFn) -> StepProgram:
    """Random straight-line programs: each step reads some earlier results, and may use scratch."""
    source = Buffer("input", draw(st.integers(1, 4000)))
    alive = [source]
    steps = []
    for i in range(draw(st.integers(1, 12))):
        reads = tuple(draw(st.lists(st.sampled_from(alive), min_size=1, max_size=3)))
        results = tuple(
            Buffer("temporary", draw(st.integers(1, 5000)), label=f"r{i}") for _ in range(draw(st.integers(1, 2)))
        )
        scratch = tuple(Buffer("temporary", draw(st.integers(1, 3000))) for _ in range(draw(st.integers(0, 1))))
        steps.append(Step(f"k{i}", reads, results, scratch))
        alive += results
    outputs = tuple(draw(st.lists(st.sampled_from(alive), min_size=1, max_size=3)))
    return StepProgram(tuple(steps), (source,), (), outputs)


@settings(max_examples=200, deadline=None)
@given(programs())
def test_no_kernel_writes_over_what_is_still_needed(program: StepProgram) -> None:
    """Run the steps on an arena of marks: every argument still carries its own mark when it is read."""
    plan = plan_memory(program)
    arena: list[Buffer | None] = [None] * plan.arena_bytes

    def mark(buffer: Buffer) -> None:
        at = plan.offsets[buffer]
        assert at % ALIGNMENT == 0
        assert at + buffer.nbytes <= plan.arena_bytes
        arena[at : at + buffer.nbytes] = [buffer] * buffer.nbytes

    def intact(buffer: Buffer) -> bool:
        at = plan.offsets[buffer]
        return all(b is buffer for b in arena[at : at + buffer.nbytes])

    for step in program.steps:
        for buffer in (*step.scratch, *step.results):
            mark(buffer)
        assert all(intact(b) for b in (*step.arguments, *step.results) if b.kind == "temporary")
    assert all(intact(b) for b in program.outputs if b.kind == "temporary")


def test_a_chain_needs_two_buffers() -> None:
    """In a chain of equal sizes only the value read and the value written are alive."""
    buffers = [Buffer("temporary", 1000) for _ in range(10)]
    steps = [Step(f"k{i}", (buffers[i],), (buffers[i + 1],)) for i in range(9)]
    program = StepProgram(tuple(steps), (), (), (buffers[-1],))
    assert plan_memory(program).arena_bytes == 2 * aligned(1000)


def test_outputs_placed_elsewhere_take_no_room() -> None:
    """What is written straight into the caller's memory has no place in the arena."""
    result = Buffer("temporary", 1000)
    program = StepProgram((Step("k", (), (result,)),), (), (), (result,))
    plan = plan_memory(program, elsewhere=[result])
    assert plan.arena_bytes == 0
    assert not plan.offsets
