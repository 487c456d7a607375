"""Writes a GGUF file whose tensors are the dequantised tensors of another GGUF file, in 16 bits.

The peers then compute with the very weights that kvshare computes with: kvshare dequantises at load, rounds to bf16
and multiplies in bf16. Norms (one-dimensional tensors) stay float32, metadata and the order of rows stay as they are.

Needs the package `gguf`; run.py runs it inside its virtual environment.
Usage: dequantise.py IN.gguf OUT.gguf bf16|f16
"""

import sys

import gguf
import numpy as np

FILE_TYPES = {"bf16": gguf.LlamaFileType.MOSTLY_BF16, "f16": gguf.LlamaFileType.MOSTLY_F16}
SKIPPED = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type",
           "general.quantization_version"}


def bf16_bytes(x):
    """float32 array -> its bf16 rounding (to nearest, ties to even) as bytes, last axis doubled."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)


def copy_field(writer, field):
    kind = field.types[0]
    value = field.contents()
    if kind == gguf.GGUFValueType.ARRAY:
        writer.add_key_value(field.name, value, kind, sub_type=field.types[-1])
    else:
        writer.add_key_value(field.name, value, kind)


def main(source, target, dtype):
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name not in SKIPPED:
            copy_field(writer, field)
    writer.add_file_type(FILE_TYPES[dtype])
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = values.reshape(list(reversed(tensor.shape.tolist())))
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        elif dtype == "f16":
            writer.add_tensor(tensor.name, values.astype(np.float16))
        else:
            writer.add_tensor(tensor.name, bf16_bytes(values), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
