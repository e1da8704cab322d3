"""What `import senet` offers."""

import subprocess
import sys
import tomllib
import types
from pathlib import Path

import senet


def test_every_public_name_is_there() -> None:
    for name in senet.__all__:
        found = getattr(senet, name)
        assert callable(found) or isinstance(found, types.ModuleType | str), name


def test_one_version_everywhere() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == senet.__version__
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changes.splitlines() if line.startswith("## "))
    assert newest.split()[1] == senet.__version__


def test_names_of_backbones_and_weights() -> None:
    from senet import detection, segmentation, weights
    from senet.models import features as backbones

    assert senet.features is backbones.features
    assert senet.save_weights is weights.save_weights
    assert senet.detection is detection
    assert senet.segmentation is segmentation


def test_import_loads_no_pytorch() -> None:
    code = "import sys, senet; dir(senet); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_predicting_loads_no_training() -> None:
    """Each command loads what it needs: predicting neither the training loop nor TensorBoard."""
    code = (
        "import sys, senet.commands.predict\n"
        "loaded = {name for name in sys.modules if name.startswith(('senet.training', "
        "'tensorboard', 'torch.utils.tensorboard', 'accelerate'))}\n"
        "sys.exit(', '.join(sorted(loaded)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert done.returncode == 0
