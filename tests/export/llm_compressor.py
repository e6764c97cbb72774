"""Writes ``llm_compressor.json``: digests of what llm-compressor makes of the checkpoint of ``recorded_checkpoint``.

    python tests/export/llm_compressor.py CHECKPOINT    # with llmcompressor 0.14, which this package does without

``model_free_ptq`` is its way of quantizing a checkpoint tensor by tensor. Run once; the result is committed.
"""

import json
import sys
import tempfile
from hashlib import sha256
from pathlib import Path

import torch
from llmcompressor import model_free_ptq
from safetensors.torch import load_file

IGNORE = [
    "lm_head",
    "re:.*embed_tokens",
    "re:.*self_attn.*",
    r"re:.*mlp\.gate$",
    r"re:.*layers\.0\.mlp\..*",
    "re:.*norm.*",
]


def digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {sha256(content).hexdigest()[:16]}"


def digests(folder: Path) -> dict[str, str]:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: digest(found[name]) for name in sorted(found)}


def main() -> None:
    source = Path(sys.argv[1])
    result = {"source": digests(source)}
    for name, scheme in (("fp8", "FP8_DYNAMIC"), ("fp8_block", "FP8_BLOCK")):
        with tempfile.TemporaryDirectory() as out:
            model_free_ptq(str(source), out, scheme=scheme, ignore=IGNORE, max_workers=1, device="cpu")
            result[name] = digests(Path(out))
            config = json.loads((Path(out) / "config.json").read_text())["quantization_config"]
            result[f"{name}_config"] = config
    (Path(__file__).parent / "llm_compressor.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
