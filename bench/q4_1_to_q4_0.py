"""Requantizes a Q4_1 GGUF to Q4_0, llama.cpp's fastest 4-bit CPU format, for a fair peer. Usage: q4_1_to_q4_0.py IN OUT (needs gguf)."""
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q


def main(source, target):
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_file_type(2)
    for t in reader.tensors:
        if t.tensor_type == Q.Q4_1:
            values = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
            writer.add_tensor(t.name, gguf.quants.quantize(values, Q.Q4_0), raw_dtype=Q.Q4_0)
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
