"""The released shape without its 61 GB, against transformers; and checkpoints that never lie in memory as a whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_north_config import RELEASED
from transformers import Cohere2MoeConfig, Cohere2MoeForCausalLM

from north_lightning.model import NorthConfig, NorthModel, named_hf_tensors

SHIPPED = Path(__file__).parents[2] / "configs" / "north_mini" / "model.json"


def names_on_disk(model: Cohere2MoeForCausalLM) -> dict[str, tuple[int, ...]]:
    """Names and shapes of transformers' parameters, its fused experts taken apart: what the released files hold."""
    names = {}
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name.endswith("experts.gate_up_proj"):
            for expert in range(shape[0]):
                for part in ("gate_proj", "up_proj"):
                    names[name.replace("gate_up_proj", f"{expert}.{part}.weight")] = (shape[1] // 2, shape[2])
        elif name.endswith("experts.down_proj"):
            for expert in range(shape[0]):
                names[name.replace("down_proj", f"{expert}.down_proj.weight")] = shape[1:]
        else:
            names[name] = shape
    return names


def test_the_released_shape_has_transformers_names_and_shapes_on_the_meta_device():
    assert NorthConfig.load(SHIPPED) == NorthConfig.from_hf(RELEASED)
    with torch.device("meta"):
        reference = Cohere2MoeForCausalLM(Cohere2MoeConfig(**RELEASED))
        model = NorthModel(NorthConfig.load(SHIPPED))
    ours = [(name, tuple(tensor.shape)) for name, tensor in named_hf_tensors(model)]
    assert len(ours) == len(dict(ours)) == 18_730
    assert dict(ours) == names_on_disk(reference)
    assert sum(parameter.numel() for parameter in model.parameters()) == 30_484_303_872


# ---- streaming -------------------------------------------------------------------------------------------------------

MANY_EXPERTS = NorthConfig(1000, 256, 256, 5, 4, 2, 64, 32, 4)
SHARD_BYTES = 2 * 2**20

PROGRAM = """
import json, sys, torch
from pathlib import Path
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint, save_checkpoint

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def peak_of(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    result = work()
    return resident("VmHWM") - before, result

folder, shard_bytes, config = Path(sys.argv[1]), int(sys.argv[2]), NorthConfig.from_hf(json.loads(sys.argv[3]))
torch.set_num_threads(1)
with torch.device("meta"):
    NorthModel(config)  # imports what torch needs for it
model = NorthModel(config)
size = sum(parameter.nbytes for parameter in model.parameters())
save, _ = peak_of(lambda: save_checkpoint(model, folder, max_shard_bytes=shard_bytes))
del model
load, _ = peak_of(lambda: load_checkpoint(folder))
print(json.dumps({"model": size, "save": save, "load": load}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_saving_and_loading_hold_one_shard_beside_the_model(tmp_path):
    """109 MB in more than 50 files: saving needs a few shards' memory more, loading the model's and a few shards'."""
    arguments = [str(tmp_path / "checkpoint"), str(SHARD_BYTES), json.dumps(MANY_EXPERTS.to_hf())]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak = json.loads(done.stdout)
    assert peak["model"] > 100e6
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 50
    slack = 12 * SHARD_BYTES
    assert peak["save"] < slack
    assert peak["model"] - SHARD_BYTES < peak["load"] < peak["model"] + slack
