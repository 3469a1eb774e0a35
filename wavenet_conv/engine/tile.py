"""What loops need of the processor that Numba has no word for: a product in registers, and fetching memory ahead.

LLVM does not keep a block of results in registers when it vectorizes loops over arrays, so this one loop is written in
LLVM's own language. Each row of the results is added up alone, from its first input to its last: its bits do not depend
on the other rows.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

WIDTH = 64  # bytes of a block's rows: one register of AVX-512, two of AVX2
# Rows of a block: with two registers for each, AVX2 has room for six.
ROWS = (
    12
    if "+avx512f" in (getattr(numba.config, "CPU_FEATURES", None) or binding.get_host_cpu_features().flatten())
    else 6
)


@intrinsic
def multiply_block(typingctx: Any, x: Any, weights: Any, bias: Any, column: Any, out: Any, row: Any, step: Any) -> Any:
    """`out[row + i * step, columns] = x[i] @ weights[:, columns] + bias[columns]` for i < ROWS.

    Columns are as many as WIDTH holds, from `column` on. x `(ROWS, inputs)`, weights `(inputs, outputs)`, bias
    `(outputs,)` and out `(rows, outputs)` are contiguous and of one dtype. Nothing is checked.
    """
    signature = types.void(x, weights, bias, column, out, row, step)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def array(index: int) -> Any:
            return context.make_array(signature.args[index])(context, builder, arguments[index])

        x, weights, bias, out = (array(index) for index in (0, 1, 2, 4))
        column, row, step = (arguments[index] for index in (3, 5, 6))
        inputs, columns = cgutils.unpack_tuple(builder, weights.shape)
        number = context.get_data_type(signature.args[0].dtype)
        size = number.get_abi_size(context.target_data)
        vector = ir.VectorType(number, WIDTH // size)

        def place(array: Any, offset: Any) -> Any:
            return builder.bitcast(builder.gep(array.data, [offset]), vector.as_pointer())

        def load(array: Any, offset: Any) -> Any:
            loaded = builder.load(place(array, offset))
            loaded.align = size
            return loaded

        zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
        name = f"llvm.fmuladd.v{vector.count}f{8 * size}"
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        first = load(bias, column)
        totals = [cgutils.alloca_once_value(builder, first) for _ in range(ROWS)]
        with cgutils.for_range(builder, inputs) as loop:
            part = load(weights, builder.add(builder.mul(loop.index, columns), column))
            for i, total in enumerate(totals):
                offset = builder.add(builder.mul(inputs, inputs.type(i)), loop.index)
                one = builder.insert_element(
                    vector(ir.Undefined), builder.load(builder.gep(x.data, [offset])), ir.IntType(32)(0)
                )
                repeated = builder.shuffle_vector(one, vector(ir.Undefined), zeros)
                builder.store(builder.call(fma, [repeated, part, builder.load(total)]), total)
        for i, total in enumerate(totals):
            at = builder.mul(builder.add(row, builder.mul(step, step.type(i))), columns)
            stored = builder.store(builder.load(total), place(out, builder.add(at, column)))
            stored.align = size
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def prefetch(typingctx: Any, array: Any, row: Any, column: Any) -> Any:
    """Starts to bring `array[row, column]` of a contiguous array into the cache; it may lie outside."""
    signature = types.void(array, row, column)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        row, column = arguments[1:]
        _, columns = cgutils.unpack_tuple(builder, array.shape)
        address = builder.gep(array.data, [builder.add(builder.mul(row, columns), column)])
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.bitcast(address, byte), flag(0), flag(3), flag(1)])  # data, to be read soon
        return context.get_dummy_value()

    return signature, generate
