"""Networks of the paper, each plain and with SE, by name (`senet.models.registry`)."""

# Each registers its networks.
from senet.models import inception_bn as inception_bn
from senet.models import inception_resnet_v2 as inception_resnet_v2
from senet.models import inception_v3 as inception_v3
from senet.models import mobilenet as mobilenet
from senet.models import resnet as resnet
from senet.models import shake_shake as shake_shake
from senet.models import shufflenet as shufflenet
from senet.models import vgg as vgg
from senet.models.network import Network as Network
from senet.models.network import Stage as Stage
from senet.models.network import build_model as build_model
from senet.models.options import SEOptions as SEOptions
from senet.models.registry import entry as entry
from senet.models.registry import list_models as list_models
