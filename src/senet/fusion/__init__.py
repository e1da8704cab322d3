"""senet.fuse: the tails and SE blocks of any network run through the operator, names untouched."""

from senet.fusion.fuse import Fused as Fused
from senet.fusion.fuse import FusionReport as FusionReport
from senet.fusion.fuse import Left as Left
from senet.fusion.fuse import fuse as fuse
from senet.fusion.fuse import unfuse as unfuse
