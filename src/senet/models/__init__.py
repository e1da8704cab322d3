"""Networks of the paper, each plain and with SE, by name (`senet.models.registry`)."""

from senet.models import resnet as resnet  # registers its networks
from senet.models.network import Network as Network
from senet.models.network import SEOptions as SEOptions
from senet.models.registry import build_model as build_model
from senet.models.registry import entry as entry
from senet.models.registry import list_models as list_models
