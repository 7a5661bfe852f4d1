"""The baseline that a tutorial gives: ONNX Runtime's own static quantizer with its own calibration, W8A8, QDQ.

    python examples/benchmarks/naive_w8a8.py --float genai-fp32 --calib wiki.valid.raw --out naive

`onnxruntime.quantization.quantize_static` with what it does when nothing is said (QDQ, MinMax over all calibration
tokens, int8 activations per tensor with a zero point, int8 weights), and per-channel weights. Only MatMul by default;
`--ops all` leaves the choice of operators to the quantizer, and `--activations uint8` is what its documentation advises
where int8 is slow. The float model is a folder of GenAI's builder (`python -m onnxruntime_genai.models.builder -p fp32
-e cpu`), and so is the result. The token table, which is the transposed lm_head there, is made a tensor of its own
first: quantized together, the whole table would be dequantized in every step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from afq_export.load.corpus import cut_windows, read_text_corpus
from afq_export.load.tokenizer import load_folder_tokenizer, tokenizer_digest

ACTIVATIONS = {"int8": QuantType.QInt8, "uint8": QuantType.QUInt8}


class Windows(CalibrationDataReader):
    """Windows of real text, each from an empty cache."""

    def __init__(self, decoder: dict, ids: np.ndarray) -> None:
        self._feeds = self._all(decoder, ids)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The inputs of the next window."""
        return next(self._feeds, None)

    @staticmethod
    def _all(decoder: dict, ids: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
        names = (decoder["inputs"]["past_key_names"], decoder["inputs"]["past_value_names"])
        caches = {name % layer: empty for name in names for layer in range(decoder["num_hidden_layers"])}
        for number, row in enumerate(ids):
            print(f"calibration window {number + 1} of {len(ids)}", file=sys.stderr, flush=True)
            yield {"input_ids": row[None], "attention_mask": np.ones_like(row)[None], **caches}


def main() -> None:
    """Writes the quantized model and its data file."""
    arguments = parse()
    source, out = Path(arguments.float), Path(arguments.out)
    decoder = json.loads((source / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    tokenizer = load_folder_tokenizer(source)
    corpus = read_text_corpus(Path(arguments.calib))
    windows = cut_windows(corpus, tokenizer, tokenizer_digest(tokenizer), arguments.length, arguments.windows)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        plain = Path(folder) / "float.onnx"
        model = onnx.load(source / "model.onnx")
        separate_embedding(model)
        onnx.save(model, plain, save_as_external_data=True, location="float.onnx.data")
        del model
        quantize_static(
            plain,
            out / "model.onnx",
            Windows(decoder, windows.ids_NT.numpy()),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=None if arguments.ops == "all" else arguments.ops.split(","),
            activation_type=ACTIVATIONS[arguments.activations],
            per_channel=True,
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=True,
        )
    for file in source.iterdir():
        if not file.name.startswith("model.onnx"):
            shutil.copy(file, out)


def separate_embedding(model: onnx.ModelProto) -> None:
    """Replaces `Gather(Transpose(lm_head))` by a Gather from the transposed tensor."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in list(model.graph.node):
        if node.op_type == "Transpose" and node.input[0] in tensors:
            table = numpy_helper.to_array(tensors[node.input[0]]).T.copy()
            model.graph.initializer.append(numpy_helper.from_array(table, node.output[0]))
            model.graph.node.remove(node)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--float", required=True, help="folder of GenAI's builder, fp32")
    parser.add_argument("--calib", required=True, help="text")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--ops", default="MatMul", help="operators to quantize, or all")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="int8")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    return parser.parse_args()


if __name__ == "__main__":
    main()
