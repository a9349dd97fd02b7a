"""Executes the PTX that Triton compiles, in NumPy and without a GPU.

The interpreter of Triton runs a kernel's operations on whole arrays. The executor runs the compiled
code: its layouts, shuffles, shared memory, predicates and vector stores, 32 lanes of a warp at
once, the warps of a block interleaved at random between barriers, the blocks in random order. It
finds races, reads of memory that nobody wrote, accesses outside every buffer and shuffles that not
all their lanes reach, and counts what a launch does. Not modelled: time, caches, tensor cores and
the memory order beyond barriers.

    values        the text of a kernel → instructions, and their operands
    instructions  what each computes, loads, stores and shuffles
    memory        buffers, and who touched what since the last barrier
    execute       warps, which may diverge, blocks and barriers: `execute` runs one launch
    launch        stands in for a `@triton.jit` kernel
    __main__      the launches of the project's kernels, and what they must give
"""
