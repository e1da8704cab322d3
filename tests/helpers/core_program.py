"""Run in an environment that holds nothing but the core: `python core_program.py FOLDER`.

Prints where senet was loaded from, and why its C++ kernels are or are not there.
"""

import sys
from pathlib import Path

import torch

import senet
from senet import SqueezeExcitation, ops

folder = Path(sys.argv[1])
torch.manual_seed(0)

# The block, and the operator's implementations against its oracle, gradients too.
maps = torch.randn(2, 16, 6, 5)
block = SqueezeExcitation(16, reduction=4)
blocks = {}
for implementation in ("reference", "auto"):
    x = maps.clone().requires_grad_()
    with ops.use(implementation):
        y = block(x)
    blocks[implementation] = y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
torch.testing.assert_close(blocks["auto"], blocks["reference"], rtol=1e-4, atol=1e-5)
width = torch.randn(4, 16), torch.zeros(4), torch.randn(16, 4), torch.zeros(16)
assert ops.squeeze_excite(maps, *width).shape == maps.shape

# A network, its weights to a file and back.
network = senet.create_model("se_resnet8_cifar", num_classes=3).eval()
assert "se_resnet50" in senet.list_models()
image = torch.randn(2, *network.input_size)
outputs = network(image).detach()
senet.save_weights(network, folder / "weights.safetensors")
again = senet.create_model("se_resnet8_cifar", num_classes=3).eval()
senet.load_weights(again, folder / "weights.safetensors")
assert torch.equal(again(image), outputs)
assert len(senet.features(again)(image)) == 3

# What it consists of; gates recorded and folded; blocks put into a plain network, and out again.
assert len(senet.anatomy.excitations(network, image)) == 3
gates = senet.record_gates(network, [image])
folded = senet.fold_gates(network, gates, tolerance=1.0)
assert len(senet.anatomy.excitations(folded.model, image)) == 0
plain = senet.create_model("resnet8_cifar").eval()
expected = plain(image)
senet.insert(plain)
assert torch.equal(plain(image), expected)
senet.save_adapter(plain, folder / "adapter.safetensors")
senet.remove(plain)
senet.load_adapter(plain, folder / "adapter.safetensors")
assert torch.equal(plain(image), expected)

# A network that knows nothing of this package, fused; and what inference makes of ours.
foreign = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), SqueezeExcitation(16)
)
foreign.eval()
expected = foreign(maps[:, :3])
senet.fuse(foreign, maps[:, :3])
torch.testing.assert_close(foreign(maps[:, :3]), expected, rtol=1e-4, atol=1e-5)
optimized = senet.optimize(network, image)
torch.testing.assert_close(optimized(image), outputs, rtol=1e-4, atol=1e-5)

missing = {}
for name in ("detection", "segmentation"):
    try:
        getattr(senet, name)
    except ModuleNotFoundError as error:
        missing[name] = str(error)
remedy = "torchvision is not installed: pip install 'senet[train]'"
assert missing == {name: f"senet.{name}: {remedy}" for name in ("detection", "segmentation")}

print(Path(senet.__file__).parent)
print(ops.implementations()["cpu"].reason)
